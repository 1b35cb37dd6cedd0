"""The decisions of scheduling as pure functions: no queue, no model, no hidden clock. See docs/scheduling.md.

A worker reads a bounded `Window` of what waits, `plan_batch` decides, and the queue leases exactly that.
All times are milliseconds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from flashbulb_service.timing import KNEE_SHARE, LearnedCap, Tau, TimeModel

Row = TypeVar("Row")

SHORT, LONG = "short", "long"
LONG_SUFFIX = ":long"
LONG_MS = 5_000.0  # work of which one row takes longer than this goes into the long lane
LONG_SHARE = 0.25  # of several workers, and of the device time of each while short work waits (turns.py)
SHRINK_SHARE = 0.99  # a batch is made smaller for its tightest row while it keeps this share of throughput
QUANTUM_SHARE = 0.25  # of a full batch: how far ahead of the others a tenant may get by earlier deadlines
TIE_MS = 1.0  # buckets whose slack differs by less are equally urgent
UNKNOWN_ROW_MS = 100.0  # charged for one unit of cost while no time is known
TOKEN_PX = 16


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued job, as far as scheduling needs to know it."""

    id: str
    tenant: str
    due_ms: float  # order in the bucket: the deadline (or the target of jobs without one), less priority
    deadline_ms: float | None = None  # after this, a result is worth nothing; None = it always is
    cost: float = 1.0
    weight: float = 1.0
    is_suspect: bool = False  # an earlier run of it failed or took its worker along: it runs alone


@dataclass(frozen=True, slots=True)
class BucketWindow:
    """The jobs of one bucket that a worker may look at."""

    model: str
    bucket: str
    rows: tuple[Waiting, ...]
    num_waiting: int

    @property
    def lane(self) -> str:
        """Return the lane that the bucket belongs to."""
        return lane_of(self.bucket)


@dataclass(frozen=True, slots=True)
class Window:
    """What waits for a worker, and what was used so far. A bounded part of the queue, fair order first."""

    now_ms: float
    buckets: tuple[BucketWindow, ...]
    used_ms: Mapping[str, float] = field(default_factory=dict)  # tenant -> device time charged, weighted
    num_long: int = 0  # other workers that run long work now
    num_workers: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What to lease, what to fail as hopeless, and what that costs."""

    model: str
    bucket: str
    take: tuple[str, ...]
    drop: tuple[str, ...] = ()
    predicted_ms: float = 0.0  # of the batch, with the swap if there is one
    charges_ms: tuple[float, ...] = ()  # per row of `take`, by cost and weight
    clock_ms: float = 0.0  # least used device time of all tenants that wait for the model


@dataclass(frozen=True, slots=True)
class BucketFacts:
    """What a worker knows of a bucket: its time model, its cap, and the price of loading its model."""

    cap: int
    tau: Tau | None = None
    swap_ms: float = 0.0  # 0 = the model is warm


def bucket_name(
    model: str, width: int, height: int, num_steps: int, lane: str = SHORT, *, frames: int = 1
) -> str:
    """Name the bucket whose rows may share a batch: one model version, one shape, one number of steps."""
    shape = f"{width}x{height}" + (f"x{frames}" if frames > 1 else "")
    return f"{model}:{shape}:{num_steps}" + (LONG_SUFFIX if lane == LONG else "")


def count_tokens(width: int, height: int, frames: int, num_steps: int) -> int:
    """Count what a row is to the device: patches of 16 x 16 pixels, of every frame, in every step."""
    return -(-width // TOKEN_PX) * -(-height // TOKEN_PX) * frames * num_steps


def lane_of(bucket: str) -> str:
    """Return the lane that a bucket's name says."""
    return LONG if bucket.endswith(LONG_SUFFIX) else SHORT


def steps_of(bucket: str) -> int:
    """Return the number of steps that a bucket's name says."""
    return int(bucket.removesuffix(LONG_SUFFIX).rpartition(":")[2])


def choose_lane(task: str, calibration: Mapping[int, float] | None = None) -> str:
    """Put videos, and whatever takes long for a single row, into the long lane."""
    single_ms = (calibration or {}).get(1, 0.0)
    return LONG if task == "text-to-video" or single_ms > LONG_MS else SHORT


def open_lane(window: Window, long_share: float = LONG_SHARE) -> str | None:
    """Return the only lane that a worker may serve now, or None for any.

    Long work holds at most its share of several workers: at least one, never all of two or more.
    """
    most_long = max(1, int(long_share * window.num_workers))
    return SHORT if window.num_workers > 1 and window.num_long >= most_long else None


def fair_fill(
    rows: Sequence[Waiting],
    num_rows: int,
    used_ms: Mapping[str, float],
    row_ms: Callable[[Waiting], float],
    quantum_ms: float,
) -> list[Waiting]:
    """Choose up to num_rows rows, earliest due first, but nobody far ahead of the others' device time.

    A tenant is passed over while it has used `quantum_ms` or more above the tenant that used least among
    those that still have rows here. So a lone tenant gets plain earliest-deadline-first, and competing ones
    get equal (weighted) shares with earliest-deadline-first inside a quantum.
    """
    queues: dict[str, list[Waiting]] = {}
    for row in sorted(rows, key=lambda row: (row.due_ms, row.id), reverse=True):
        queues.setdefault(row.tenant, []).append(row)
    used = {tenant: used_ms.get(tenant, 0.0) for tenant in queues}
    chosen: list[Waiting] = []
    while queues and len(chosen) < num_rows:
        least = min(used[tenant] for tenant in queues)
        allowed = [tenant for tenant in queues if used[tenant] < least + quantum_ms]
        tenant = min(allowed, key=lambda name: (queues[name][-1].due_ms, queues[name][-1].id))
        row = queues[tenant].pop()
        chosen.append(row)
        used[tenant] += row_ms(row)
        if not queues[tenant]:
            del queues[tenant]
    return chosen


def form_batch(
    rows: Sequence[Waiting],
    now_ms: float,
    facts: BucketFacts,
    used_ms: Mapping[str, float],
) -> tuple[list[Waiting], list[Waiting]]:
    """Choose a bucket's next batch, and the rows that are hopeless in it.

    A row is hopeless when it would miss its deadline in the batch that is about to start. The batch is made
    smaller for it while that costs little throughput or no other row; otherwise the row is dropped, since
    serving it late would make the next ones late as well.

    Returns:
        (rows to run, earliest due first; rows to drop).
    """
    waiting = list(rows)
    dropped: list[Waiting] = []
    while waiting:
        chosen = _choose(waiting, facts, used_ms)
        if facts.tau is None:
            late = [row for row in chosen if row.deadline_ms is not None and row.deadline_ms <= now_ms]
        else:
            fitting = _fit_deadlines(chosen, waiting, now_ms + facts.swap_ms, facts.tau, facts.cap)
            if fitting:
                return sorted(fitting, key=_order), dropped
            late = [min((row for row in chosen if row.deadline_ms is not None), key=_deadline)]
        if not late:
            return sorted(chosen, key=_order), dropped
        dropped += late
        gone = {row.id for row in late}
        waiting = [row for row in waiting if row.id not in gone]
    return [], dropped


def _choose(rows: Sequence[Waiting], facts: BucketFacts, used_ms: Mapping[str, float]) -> list[Waiting]:
    cap = max(1, facts.cap)
    quantum_ms = QUANTUM_SHARE * _full_ms(facts)

    def fill(these: Sequence[Waiting]) -> list[Waiting]:
        return fair_fill(these, cap, used_ms, lambda row: charge(row, cap, facts.tau), quantum_ms)

    chosen = fill(rows)
    if chosen[0].is_suspect:
        return chosen[:1]
    if any(row.is_suspect for row in chosen):  # whose places are for those behind them
        chosen = fill([row for row in rows if not row.is_suspect])
    return chosen


def _fit_deadlines(
    chosen: list[Waiting], waiting: Sequence[Waiting], start_ms: float, tau: Tau, cap: int
) -> list[Waiting]:
    """Return the rows of `chosen` that can start now and all be in time; [] when its tightest row cannot.

    Rows that a smaller batch leaves out are the last of the fair order, not the last due: else a tenant that
    floods the queue with early deadlines would push the others out.
    """
    hard = [row for row in chosen if row.deadline_ms is not None]
    if not hard:
        return chosen
    tightest = min(hard, key=_deadline)
    left_ms = _deadline(tightest) - start_ms
    size = len(chosen)
    while size and tau.safe(size) > left_ms:
        size -= 1
    if size == len(chosen):
        return chosen
    if not size:
        return []
    small = [tightest, *(row for row in chosen if row is not tightest)][:size]
    if tau.throughput(size) >= SHRINK_SHARE * tau.throughput(len(chosen)):
        return small
    in_batch = {row.id for row in small}
    rest = [row for row in waiting if row.id not in in_batch]
    end_ms = start_ms + tau.safe(size) + tau.safe(min(len(rest), cap))
    spares = len(rest) <= cap and all(row.deadline_ms is None or row.deadline_ms >= end_ms for row in rest)
    return small if spares else []


def charge(row: Waiting, num_rows: int, tau: Tau | None) -> float:
    """Price a row's part of a batch, in device milliseconds over its tenant's weight."""
    ms = tau(num_rows) / num_rows if tau else UNKNOWN_ROW_MS * row.cost
    return ms / row.weight


@dataclass(frozen=True, slots=True)
class _Candidate:
    bucket: BucketWindow
    facts: BucketFacts
    rows: list[Waiting]
    is_owed: bool

    @property
    def batch_ms(self) -> float:
        tau = self.facts.tau
        return self.facts.swap_ms + (tau(len(self.rows)) if tau else 0.0)

    def slack_ms(self, now_ms: float) -> float:
        return min(row.due_ms for row in self.rows) - now_ms - self.batch_ms

    @property
    def throughput(self) -> float:
        return len(self.rows) / self.batch_ms if self.batch_ms else 0.0


def plan_batch(
    window: Window,
    facts: Callable[[str, str], BucketFacts],
    *,
    long_share: float = LONG_SHARE,
) -> Plan | None:
    """Decide what a free worker does next; None when nothing waits for it.

    Lane first, then buckets in which a tenant waits that is not ahead of the others, then the least slack
    (due - now - batch time), then the best throughput. A model that is not loaded waits until it must, or
    until no loaded one has work.
    """
    lane = open_lane(window, long_share)
    buckets = [bucket for bucket in window.buckets if bucket.rows and lane in (None, bucket.lane)]
    if not buckets:
        return None
    used = {row.tenant: window.used_ms.get(row.tenant, 0.0) for bucket in buckets for row in bucket.rows}
    least_ms = min(used.values())
    candidates: list[_Candidate] = []
    drops: dict[tuple[str, str], Plan] = {}
    for bucket in buckets:
        known = facts(bucket.model, bucket.bucket)
        rows, dropped = form_batch(bucket.rows, window.now_ms, known, used)
        clock = min(used[row.tenant] for row in bucket.rows)
        drops[bucket.model, bucket.bucket] = Plan(
            bucket.model, bucket.bucket, (), tuple(row.id for row in dropped), clock_ms=clock
        )
        if rows:
            is_owed = min(used[row.tenant] for row in rows) < least_ms + _full_ms(known)
            candidates.append(_Candidate(bucket, known, rows, is_owed))
    if not candidates:
        return max(drops.values(), key=lambda plan: len(plan.drop))
    best = _best(candidates, window.now_ms)
    tau, size = best.facts.tau, len(best.rows)
    return replace(
        drops[best.bucket.model, best.bucket.bucket],
        take=tuple(row.id for row in best.rows),
        predicted_ms=best.batch_ms,
        charges_ms=tuple(charge(row, size, tau) for row in best.rows),
    )


def _best(candidates: Sequence[_Candidate], now_ms: float) -> _Candidate:
    if len(candidates) == 1:
        return candidates[0]
    owed = [one for one in candidates if one.is_owed] or list(candidates)
    warm = [one for one in owed if not one.facts.swap_ms]
    if warm:
        wait_ms = min(one.batch_ms for one in warm)
        cold_that_must = [one for one in owed if one.facts.swap_ms and one.slack_ms(now_ms) <= wait_ms]
        owed = [*warm, *cold_that_must]
    least_ms = min(one.slack_ms(now_ms) for one in owed)
    urgent = [one for one in owed if one.slack_ms(now_ms) <= least_ms + TIE_MS]
    return max(urgent, key=lambda one: one.throughput)


def rows_within(max_tokens: int | None, tokens: int, cap: int) -> int:
    """Return how many rows of `tokens` each a batch may have: at least one, at most `cap`."""
    return cap if max_tokens is None else max(1, min(cap, max_tokens // tokens))


def batch_cap(max_batch: int, limit: int, calibration: Mapping[int, float] | None = None) -> int:
    """Choose the largest batch worth forming: the calibrated knee, or without one what both limits allow.

    Beyond the knee a larger batch only makes its first row wait longer.

    Args:
        max_batch: what the bundle's graphs allow.
        limit: what the operator allows.
        calibration: batch size -> milliseconds, as the bundle's manifest has it for this backend.
    """
    allowed = max(1, min(max_batch, limit))
    rates = {size: size / ms for size, ms in (calibration or {}).items() if size <= allowed}
    if not rates:
        return allowed
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= KNEE_SHARE * best)


@dataclass(frozen=True, slots=True)
class _Known:
    cap: int
    calibration: Mapping[int, float]
    num_steps: int | None
    limits: Mapping[str, int]

    def calibration_of(self, bucket: str) -> Mapping[int, float]:
        return self.calibration if self.num_steps in (None, steps_of(bucket)) else {}


class Scheduler:
    """What one worker has learnt: the time of its batches and how many rows fit; plans by `plan_batch`."""

    def __init__(self, swap_ms: Callable[[str], float] = lambda model: 0.0) -> None:
        """Know no model yet.

        Args:
            swap_ms: model -> how long a batch of it would first wait for its load.
        """
        self._swap_ms = swap_ms
        self._models: dict[str, _Known] = {}
        self._times: dict[tuple[str, str], TimeModel] = {}
        self._memory: dict[tuple[str, str], LearnedCap] = {}

    def add(
        self,
        model: str,
        cap: int,
        calibration: Mapping[int, float],
        num_steps: int | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        """Start with a model's batch cap and its calibration: batch size -> ms, or nothing.

        Args:
            num_steps: of which buckets the calibration tells; None: of all.
            limits: bucket -> a lower cap of its own.
        """
        self.forget(model)
        self._models[model] = _Known(cap, calibration, num_steps, limits or {})

    def forget(self, model: str) -> None:
        """Drop what was learnt of a model. Batches of it that still run teach nothing more."""
        self._models.pop(model, None)
        for learnt in (self._times, self._memory):
            for key in [key for key in learnt if key[0] == model]:
                del learnt[key]

    def facts(self, model: str, bucket: str) -> BucketFacts:
        """Return what is known of a bucket now."""
        tau = self.times(model, bucket).tau
        return BucketFacts(self._learned(model, bucket).rows, tau, self._swap_ms(model))

    def plan(self, window: Window) -> Plan | None:
        """Decide what to do next; a model that was forgotten since the window was read is left alone."""
        known = tuple(bucket for bucket in window.buckets if bucket.model in self._models)
        return plan_batch(replace(window, buckets=known), self.facts)

    def times(self, model: str, bucket: str) -> TimeModel:
        """Return the time model of a bucket."""
        key = (model, bucket)
        if key not in self._times:
            self._times[key] = TimeModel(self._models[model].calibration_of(bucket))
        return self._times[key]

    def predicted_ms(self, model: str, bucket: str, num_rows: int) -> float | None:
        """Predict the time of a batch; None when it is not known, or the model is gone."""
        tau = self.times(model, bucket).tau if model in self._models else None
        return tau(num_rows) if tau else None

    def lone_ms(self, model: str, bucket: str) -> float | None:
        """Return the time of a batch of one row, None where nobody has asked for the bucket's yet; from any thread."""
        times = self._times.get((model, bucket))
        tau = times.tau if times else None
        return tau(1) if tau else None

    def observe(self, model: str, bucket: str, num_rows: int, ms: float) -> float | None:
        """Learn from a batch that ran; return measured over calibrated time (median), None without calibration."""
        if model not in self._models:
            return None
        times = self.times(model, bucket)
        times.observe(num_rows, ms)
        self._learned(model, bucket).passed(num_rows)
        return times.drift if self._models[model].calibration_of(bucket) else None

    def out_of_memory(self, model: str, bucket: str, num_rows: int) -> None:
        """Learn from a batch that did not fit."""
        if model in self._models:
            self._learned(model, bucket).out_of_memory(num_rows)

    def _learned(self, model: str, bucket: str) -> LearnedCap:
        known = self._models[model]
        cap = min(known.cap, known.limits.get(bucket, known.cap))
        return self._memory.setdefault((model, bucket), LearnedCap(cap))


def halves(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Cut a batch that failed into two, for the search for the row that spoils it."""
    middle = (len(rows) + 1) // 2
    yield list(rows[:middle])
    yield list(rows[middle:])


def in_chunks(rows: Sequence[Row], cap: int) -> Iterator[list[Row]]:
    """Cut rows into batches of at most `cap`, in order.

    Raises:
        ValueError: cap < 1.
    """
    if cap < 1:
        raise ValueError(f"expected a batch cap of at least 1, got {cap}")
    for start in range(0, len(rows), cap):
        yield list(rows[start : start + cap])


def _full_ms(facts: BucketFacts) -> float:
    cap = max(1, facts.cap)
    return facts.tau(cap) if facts.tau else cap * UNKNOWN_ROW_MS


def _order(row: Waiting) -> tuple[float, str]:
    return row.due_ms, row.id


def _deadline(row: Waiting) -> float:
    assert row.deadline_ms is not None
    return row.deadline_ms
