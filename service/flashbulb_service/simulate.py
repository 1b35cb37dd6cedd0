"""A discrete-event simulation of one namespace: devices, arrivals, and the same decisions as the server's.

`plan_batch` is the worker's own; `admits` is the rule of queue/lua/enqueue.lua, and a test holds the two
together. Time is simulated, so an hour of load takes seconds, and equal seeds give equal results.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flashbulb_service.scheduler import BucketFacts, BucketWindow, Waiting, Window, lane_of, plan_batch
from flashbulb_service.timing import Tau

HALF_LIFE_MS = 60_000.0


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
    lanes: dict[str, float] = field(default_factory=dict)
    lanes_at: float = 0.0
    clock: float = 0.0

    def window(self, now: float, num_rows: int, others_long: int, num_workers: int) -> Window:
        """Look as window.lua does: some urgent rows of each tenant."""
        buckets = []
        for name, waiting in self.rows.items():
            by_tenant: dict[str, list[Waiting]] = {}
            for row, _ in sorted(waiting.values(), key=lambda pair: (pair[0].due_ms, pair[0].id)):
                by_tenant.setdefault(row.tenant, []).append(row)
            owed = sorted(by_tenant, key=lambda tenant: (self.used_by(tenant), tenant))[:16]
            each = math.ceil(num_rows / max(1, len(owed)))
            rows = tuple(row for tenant in owed for row in by_tenant[tenant][:each])
            buckets.append(BucketWindow("m", name, rows, len(waiting)))
        used = {row.tenant: self.used_by(row.tenant) for bucket in buckets for row in bucket.rows}
        return Window(now, tuple(buckets), used, dict(self.lanes), others_long, num_workers)

    def used_by(self, tenant: str) -> float:
        return max(self.clock, self.used.get(tenant, 0.0))

    def charge_lane(self, lane: str, ms: float, now: float) -> None:
        fade = 0.5 ** ((now - self.lanes_at) / HALF_LIFE_MS)
        self.lanes = {name: used * fade for name, used in self.lanes.items()}
        self.lanes[lane] = self.lanes.get(lane, 0.0) + ms
        self.lanes_at = now


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
) -> list[Outcome]:
    """Run arrivals (in order of time) to their end.

    Args:
        taus: what the scheduler believes of each bucket's times; its margin guards deadlines.
        truth: what the device really takes; default: what is believed.
        noise: sigma of log-normal noise on every batch.
    """
    draws = random.Random(seed)
    queue = _Queue()
    real = truth or taus
    facts: Callable[[str, str], BucketFacts] = lambda _model, bucket: BucketFacts(caps[bucket], taus[bucket])  # noqa: E731
    believed_end = [0.0] * num_workers
    corrections: list[list[tuple[str, float]]] = [
        [] for _ in range(num_workers)
    ]  # (tenant, ms), of running batches
    busy_lane: list[str | None] = [None] * num_workers
    events: list[tuple[float, int, int]] = [(one.at_ms, 1, i) for i, one in enumerate(arrivals)]
    heapq.heapify(events)  # (time, 0 = a worker is free | 1 = an arrival, which)
    idle = set(range(num_workers))
    outcomes: list[Outcome] = []

    def start_batches(now: float) -> Iterator[tuple[float, int]]:
        for worker in sorted(idle):
            while True:
                long = sum(lane == "long" for other, lane in enumerate(busy_lane) if other != worker)
                plan = plan_batch(queue.window(now, 2 * max(caps.values()), long, num_workers), facts)
                if plan is None:
                    break
                for job_id in plan.drop:
                    outcomes.append(Outcome(queue.rows[plan.bucket].pop(job_id)[1], now, "dropped"))
                if not plan.take:
                    continue
                ms = real[plan.bucket](len(plan.take)) * math.exp(draws.gauss(0.0, noise) if noise else 0.0)
                for job_id, charge in zip(plan.take, plan.charges_ms, strict=True):
                    row, arrival = queue.rows[plan.bucket].pop(job_id)
                    queue.used[row.tenant] = queue.used_by(row.tenant) + charge
                    measured = ms / len(plan.take) / row.weight
                    corrections[worker].append((row.tenant, measured - charge))
                    outcomes.append(Outcome(arrival, now + ms, "done", len(plan.take)))
                queue.clock = max(queue.clock, plan.clock_ms)
                queue.charge_lane(lane_of(plan.bucket), plan.predicted_ms, now)
                if not any(queue.rows.values()):
                    queue.used.clear()
                    queue.lanes.clear()
                    queue.clock = 0.0
                believed_end[worker] = now + plan.predicted_ms
                busy_lane[worker] = lane_of(plan.bucket)
                idle.discard(worker)
                yield now + ms, worker
                break

    while events:
        now, kind, which = heapq.heappop(events)
        if kind == 0:
            idle.add(which)
            busy_lane[which] = None
            for tenant, correction in corrections[which]:
                if tenant in queue.used:
                    queue.used[tenant] += correction
            corrections[which].clear()
        else:
            arrival = arrivals[which]
            waiting = queue.rows.setdefault(arrival.bucket, {})
            due = arrival.at_ms + arrival.slo_ms
            busy = [max(0.0, end - now) for end in believed_end]
            ahead = {
                name: _rows_ahead(rows, arrival.tenant, due)
                for name, rows in queue.rows.items()
                if lane_of(name) == lane_of(arrival.bucket)
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
        for end, worker in start_batches(now):
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
