"""A unit of work and its life, in words that know neither HTTP nor Redis.

    queued ──claim──► running ──complete──► done
      ▲  ▲               │ ├──fail──► failed ──replay──► queued
      │  └──release/reap─┘ └──fail, retry──► delayed ──due──► queued
      └── cancel from queued, delayed and running ──► cancelled

A job is one row of a batch (one image or one video): a request for four images is four jobs.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

_NAME = re.compile(r"[A-Za-z0-9._@/+=-]{1,200}")
_BUCKET = re.compile(r"[A-Za-z0-9._@/+=:,-]{1,200}")


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    DELAYED = "delayed"  # waits for its retry time
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Tell whether nothing more happens to the job by itself."""
        return self in TERMINAL


TERMINAL: frozenset[JobState] = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})

# state -> the states it may move to; anything else is a bug of the queue
LEGAL_MOVES: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
        JobState.RUNNING: frozenset(
            {JobState.DONE, JobState.FAILED, JobState.CANCELLED, JobState.DELAYED, JobState.QUEUED}
        ),
        JobState.DELAYED: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
        JobState.DONE: frozenset(),
        JobState.FAILED: frozenset({JobState.QUEUED}),  # only by an operator's replay
        JobState.CANCELLED: frozenset(),
    }
)


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a caller asks for, before the queue has seen it.

    model: name@version, so that a queued job cannot change its model under the caller's feet.
    bucket: jobs of one model and bucket may share a batch (same shape, steps and dtype).
    payload: opaque bytes for the worker.
    tenant: who is charged in admission and fair sharing.
    cost: relative work (1.0 = one image at the smallest shape); charged while no batch time is known.
    weight: a tenant's share of contended device time, relative to others'.
    priority_ms: be due this much earlier; bounded by the queue's limits.
    deadline_s: seconds from now after which a result is worth nothing; None = it always is, and the queue's
        default target orders the job.
    max_attempts: how many failed or lost runs it may burn before it is dead.
    wire: the oldest version of the service whose workers understand the payload; older ones leave it alone.
    """

    model: str
    bucket: str
    payload: bytes
    tenant: str = "default"
    cost: float = 1.0
    weight: float = 1.0
    priority_ms: int = 0
    deadline_s: float | None = None
    max_attempts: int = 3
    wire: int = 1

    def __post_init__(self) -> None:
        for field, value, pattern in (
            ("model", self.model, _NAME),
            ("bucket", self.bucket, _BUCKET),
            ("tenant", self.tenant, _NAME),
        ):
            if not pattern.fullmatch(value):
                raise ValueError(
                    f"{field} must be 1 to 200 letters, digits or any of ._@/+=- , got {value!r}: rename it"
                )
        for name, number in (("cost", self.cost), ("weight", self.weight)):
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {number}")
        if self.deadline_s is not None and not (math.isfinite(self.deadline_s) and self.deadline_s > 0):
            raise ValueError(f"deadline_s must be finite and > 0 seconds from now, got {self.deadline_s}")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed job, as a worker holds it.

    attempt is the fencing token: it grows with every claim, and only the holder of the newest one may
    finish the job. burnt counts the attempts that failed or were lost; one that was handed back is none of them.
    enqueued_at is in seconds since the epoch, by the server's clock. awaited: a process wants to hear of its end.
    """

    id: str
    model: str
    bucket: str
    tenant: str
    payload: bytes
    attempt: int
    burnt: int
    enqueued_at: float
    awaited: bool = False


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job has no result: a stable code for programs, a message for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class JobView:
    """A snapshot of a job for those who wait for it. Times are seconds since the epoch, server's clock.

    error is also set on a delayed or queued job whose last attempt failed. attached: bytes that came with the news
    of its end, for those who waited; never read back.
    """

    id: str
    state: JobState
    model: str
    bucket: str
    attempt: int
    enqueued_at: float
    started_at: float | None
    finished_at: float | None
    result: bytes | None
    error: JobError | None
    attached: bytes | None = None
