"""What goes into the queue and comes out of it, besides jobs: limits, requests, batches, numbers. Plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flashbulb_service.jobs import Job
from flashbulb_service.queue.completions import Expected
from flashbulb_service.queue.windows import Lone


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the queue holds and for how long. Live = queued, delayed or running."""

    max_queued: int = 10_000  # live jobs of all tenants
    max_queued_per_tenant: int = 2_000  # live jobs of one tenant
    result_ttl_s: float = 24 * 3600.0  # a finished job can be read for this long
    idempotency_ttl_s: float = 24 * 3600.0
    dead_ttl_s: float = 7 * 24 * 3600.0  # a failed job can be replayed for this long
    max_dead: int = 1_000
    max_priority_ms: int = 60_000  # |priority_ms| is clamped to this, so nothing starves
    default_slo_s: float = 60.0  # orders jobs without a deadline, which are never dropped for being late
    backoff_s: float = 0.5  # first retry; doubles each time
    max_backoff_s: float = 60.0
    default_retry_after_s: float = 1.0  # told to refused callers while no finish rate is known
    max_retry_after_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Enqueued:
    """ids: one per job, in the order given. created: False when an idempotency key replayed them.

    waiter: who waits for them, so that it can leave; pass it to `Queue.abandon`.
    expected: hears of their end from before they were stored; pass it to `Queue.wait`.
    """

    ids: tuple[str, ...]
    created: bool
    waiter: str = field(default="", compare=False)
    expected: Expected | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Taken:
    """The jobs of a claim, and whether more work waited when it was made."""

    jobs: list[Job]
    more: bool


@dataclass(frozen=True, slots=True)
class Wake:
    """A model may have work. lone: the one job that waited, if that was all; `Queue.take` it before it is yours."""

    lone: Lone | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a request as a whole, as long as its first job.

    record: opaque bytes for whoever reads the request back.
    owner: who may read it back. lists: names of those that it appears in. events: what happens is written down.
    """

    record: bytes
    owner: str
    lists: tuple[str, ...] = ()
    events: bool = False
    hook: bool = False  # a delivery is due when the last job has ended


@dataclass(frozen=True, slots=True)
class RequestView:
    """A kept request, by the id of its first job."""

    id: str
    owner: str
    record: bytes
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DueHook:
    """An attempt at telling that a request has ended. replays: of its jobs so far; its end after one is another."""

    request_id: str
    attempt: int
    replays: int = 0


@dataclass(slots=True)
class Sparing:
    """What one who reaps again and again has heard, which tells an outage from a worker's silence; server's clock."""

    lease_ms: int
    most_apart_ms: int  # of two answers, unless there was an outage between them
    heard_ms: int = 0
    until_ms: int = 0

    def told(self) -> tuple[int, int, int, int]:
        """Return it as reap.lua takes it."""
        return self.heard_ms, self.lease_ms, self.most_apart_ms, self.until_ms


KeyMode = Literal["replay", "record", "attach"]
Gate = Literal["paused", "draining"]


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Numbers for metrics and autoscaling, of one instant."""

    queued: Mapping[str, int]  # model -> jobs waiting for a worker; models without any are left out
    running: int
    delayed: int
    dead: int
    oldest_short_s: float  # age of the short job that has been queued longest; 0.0 when none is queued
    oldest_long_s: float  # the same of long work

    @property
    def oldest_age_s(self) -> float:
        """Return the age of the job that has been queued longest."""
        return max(self.oldest_short_s, self.oldest_long_s)
