"""A discrete-event simulation of one namespace: devices, arrivals, and the same decisions as the server's.

`plan_batch` is the worker's own; `admits` is the rule of queue/lua/enqueue.lua, and a test holds the two
together. Time is simulated, so an hour of load takes seconds, and equal seeds give equal results.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flashbulb_service.scheduler import (
    LONG,
    SHORT,
    BucketFacts,
    BucketWindow,
    Plan,
    Waiting,
    Window,
    lane_of,
    open_lane,
    plan_batch,
)
from flashbulb_service.timing import Tau
from flashbulb_service.turns import Shares, next_lane


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of one row."""

    at_ms: float
    slo_ms: float
    bucket: str = "b"
    tenant: str = "default"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request: done at end_ms, or refused or dropped at that time."""

    arrival: Arrival
    end_ms: float
    fate: str  # "done", "refused" or "dropped"
    batch_size: int = 0

    @property
    def is_on_time(self) -> bool:
        """Tell whether it was done by its deadline."""
        return self.fate == "done" and self.end_ms <= self.arrival.at_ms + self.arrival.slo_ms


@dataclass(slots=True)
class _Queue:
    """What the keys of the real queue hold."""

    rows: dict[str, dict[str, tuple[Waiting, Arrival]]] = field(default_factory=dict)  # bucket -> id -> row
    used: dict[str, float] = field(default_factory=dict)
    clock: float = 0.0

    def lanes(self) -> set[str]:
        """Return the lanes in which something waits."""
        return {lane_of(name) for name, waiting in self.rows.items() if waiting}

    def window(self, now: float, num_rows: int, others_long: int, num_workers: int, lane: str) -> Window:
        """Look at a lane as window.lua does: some urgent rows of each tenant."""
        buckets = []
        for name, waiting in self.rows.items():
            if lane_of(name) != lane:
                continue
            by_tenant: dict[str, list[Waiting]] = {}
            for row, _ in sorted(waiting.values(), key=lambda pair: (pair[0].due_ms, pair[0].id)):
                by_tenant.setdefault(row.tenant, []).append(row)
            owed = sorted(by_tenant, key=lambda tenant: (self.used_by(tenant), tenant))[:16]
            each = math.ceil(num_rows / max(1, len(owed)))
            rows = tuple(row for tenant in owed for row in by_tenant[tenant][:each])
            buckets.append(BucketWindow("m", name, rows, len(waiting)))
        used = {row.tenant: self.used_by(row.tenant) for bucket in buckets for row in bucket.rows}
        return Window(now, tuple(buckets), used, others_long, num_workers)

    def used_by(self, tenant: str) -> float:
        return max(self.clock, self.used.get(tenant, 0.0))


@dataclass(slots=True)
class _Device:
    """What a worker has in hand."""

    running: str | None = None  # a lane
    shares: Shares = field(default_factory=Shares)
    turn_ms: float = 0.0
    long_rows: list[tuple[Arrival, int]] = field(default_factory=list)  # with the size of their batch
    long_steps: int = 0  # of the batch in hand that are still to be run
    step_ms: float = 0.0
    believed_end: dict[str, float] = field(default_factory=lambda: {SHORT: 0.0, LONG: 0.0})
    corrections: list[tuple[str, float]] = field(default_factory=list)  # (tenant, ms), of the running batch


def poisson(
    rate_per_s: float,
    num: int,
    slo_ms: float,
    *,
    seed: int,
    bucket: str = "b",
    tenant: str = "default",
) -> list[Arrival]:
    """Draw arrivals of a Poisson process."""
    draws = random.Random(seed)
    at, arrivals = 0.0, []
    for _ in range(num):
        at += draws.expovariate(rate_per_s / 1000)
        arrivals.append(Arrival(at, slo_ms, bucket, tenant))
    return arrivals


def admits(
    busy_ms: Sequence[float], ahead: int, tau: Tau, cap: int, allowed_ms: float, others_ms: float = 0.0
) -> bool:
    """Tell whether a row could be done in time in its own place: after full batches of what is ahead of it.

    Args:
        busy_ms: time until each worker is free.
        ahead: rows of its bucket that are served before.
        others_ms: what the rows of other buckets that are served before take each worker, in full batches.
    """
    order = sorted(busy_ms)
    batches, place = divmod(ahead, cap)
    rounds = batches // len(order)
    return others_ms + order[batches % len(order)] + rounds * tau(cap) + tau(place + 1) <= allowed_ms


def simulate(
    arrivals: Sequence[Arrival],
    taus: Mapping[str, Tau],
    caps: Mapping[str, int],
    *,
    num_workers: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    admission: bool = True,
    truth: Mapping[str, Tau] | None = None,
    steps: Mapping[str, int] | None = None,
) -> list[Outcome]:
    """Run arrivals (in order of time) to their end.

    Args:
        taus: what the scheduler believes of each bucket's times; its margin guards deadlines.
        truth: what the device really takes; default: what is believed.
        noise: sigma of log-normal noise on every batch.
        steps: of a bucket of long work: between them the device may be given to short work; default: one.
    """
    draws = random.Random(seed)
    queue = _Queue()
    real = truth or taus
    facts: Callable[[str, str], BucketFacts] = lambda _model, bucket: BucketFacts(caps[bucket], taus[bucket])  # noqa: E731
    devices = [_Device() for _ in range(num_workers)]
    events: list[tuple[float, int, int]] = [(one.at_ms, 1, i) for i, one in enumerate(arrivals)]
    heapq.heapify(events)  # (time, 0 = a worker is free | 1 = an arrival, which)
    idle = set(range(num_workers))
    outcomes: list[Outcome] = []

    def plan_for(worker: int, now: float) -> tuple[str, Plan | None] | None:
        """Decide whose turn it is on an idle device: the lane, and a new batch unless one in hand goes on."""
        device = devices[worker]
        while True:
            long = sum(bool(other.long_rows) for other in devices if other is not device)
            waiting = queue.lanes()
            if device.long_steps:
                waiting.add(LONG)
            elif open_lane(Window(now, (), num_long=long, num_workers=num_workers)) == SHORT:
                waiting.discard(LONG)
            lane = next_lane(waiting, device.shares)
            if lane is None:
                return None
            if lane == LONG and device.long_steps:
                return lane, None
            plan = plan_batch(queue.window(now, 2 * max(caps.values()), long, num_workers, lane), facts)
            if plan is None:
                return None
            for job_id in plan.drop:
                outcomes.append(Outcome(queue.rows[plan.bucket].pop(job_id)[1], now, "dropped"))
            if plan.take:
                return lane, plan

    def take(device: _Device, plan: Plan, lane: str, now: float) -> None:
        """Do as take.lua does, and begin."""
        size = len(plan.take)
        ms = real[plan.bucket](size) * math.exp(draws.gauss(0.0, noise) if noise else 0.0)
        if lane == LONG:
            device.shares = device.shares.levelled()
            device.long_steps = (steps or {}).get(plan.bucket, 1)
            device.step_ms = ms / device.long_steps
        for job_id, charge in zip(plan.take, plan.charges_ms, strict=True):
            row, arrival = queue.rows[plan.bucket].pop(job_id)
            queue.used[row.tenant] = queue.used_by(row.tenant) + charge
            device.corrections.append((row.tenant, ms / size / row.weight - charge))
            if lane == LONG:
                device.long_rows.append((arrival, size))
            else:
                outcomes.append(Outcome(arrival, now + ms, "done", size))
        queue.clock = max(queue.clock, plan.clock_ms)
        if not any(queue.rows.values()):
            queue.used.clear()
            queue.clock = 0.0
        device.believed_end[lane] = now + plan.predicted_ms
        device.turn_ms = ms

    def start_turns(now: float) -> Iterator[tuple[float, int]]:
        for worker in sorted(idle):
            device = devices[worker]
            decided = plan_for(worker, now)
            if decided is None:
                continue
            lane, plan = decided
            if plan is not None:
                take(device, plan, lane, now)
            if lane == LONG:
                device.long_steps -= 1
                device.turn_ms = device.step_ms
            device.running = lane
            idle.discard(worker)
            yield now + device.turn_ms, worker

    def end_turn(device: _Device, now: float) -> None:
        assert device.running is not None
        device.shares = device.shares.charged(device.running, device.turn_ms, now)
        if device.running == LONG and not device.long_steps:
            outcomes.extend(Outcome(arrival, now, "done", size) for arrival, size in device.long_rows)
            device.long_rows.clear()
        device.running = None
        for tenant, correction in device.corrections:
            if tenant in queue.used:
                queue.used[tenant] += correction
        device.corrections.clear()

    while events:
        now, kind, which = heapq.heappop(events)
        if kind == 0:
            idle.add(which)
            end_turn(devices[which], now)
        else:
            arrival = arrivals[which]
            waiting = queue.rows.setdefault(arrival.bucket, {})
            due = arrival.at_ms + arrival.slo_ms
            lane = lane_of(arrival.bucket)
            busy = [max(0.0, device.believed_end[lane] - now) for device in devices]
            ahead = {
                name: _rows_ahead(rows, arrival.tenant, due)
                for name, rows in queue.rows.items()
                if lane_of(name) == lane
            }
            others = sum(
                rows / taus[name].throughput(caps[name])
                for name, rows in ahead.items()
                if name != arrival.bucket
            )
            if admission and not admits(
                busy,
                ahead[arrival.bucket],
                taus[arrival.bucket],
                caps[arrival.bucket],
                arrival.slo_ms,
                others / num_workers,
            ):
                outcomes.append(Outcome(arrival, now, "refused"))
                continue
            job_id = f"{which:09d}"
            waiting[job_id] = (Waiting(job_id, arrival.tenant, due, due), arrival)
        for end, worker in start_turns(now):
            heapq.heappush(events, (end, 0, worker))
    return outcomes


def _rows_ahead(waiting: Mapping[str, tuple[Waiting, Arrival]], tenant: str, due: float) -> int:
    """Count the rows served before a new one, as rows_ahead of enqueue.lua does."""
    counts: dict[str, int] = {}
    for row, _ in waiting.values():
        counts[row.tenant] = counts.get(row.tenant, 0) + 1
    total = sum(row.due_ms <= due for row, _ in waiting.values())
    mine = counts.get(tenant, 0)
    return min(total, sum(min(count, mine + 1) for count in counts.values()))


def goodput(outcomes: Sequence[Outcome], warmup_ms: float = 0.0) -> tuple[float, float]:
    """Return (requests done on time per second, share of the done ones that were on time)."""
    counted = [one for one in outcomes if one.arrival.at_ms >= warmup_ms]
    done = [one for one in counted if one.fate == "done"]
    on_time = sum(one.is_on_time for one in done)
    span_ms = max(one.end_ms for one in counted) - warmup_ms
    return on_time / span_ms * 1000, on_time / max(1, len(done))


def mean_latency_bound(rate_per_ms: float, tau: Tau) -> float:
    """Bound the mean latency of greedy batching with no cap, in ms: Inoue, arXiv 1912.06322, for tau = base + row b."""
    load = rate_per_ms * tau.row_ms
    return 1.5 * tau.base_ms / (1 - load) + tau.row_ms / 2 * (load + 2) / (1 - load * load)
