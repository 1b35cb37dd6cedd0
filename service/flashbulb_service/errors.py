"""Every error the service raises on purpose. HTTP status codes are assigned in the API, nowhere else.

ServiceError                        has a stable `code` and a message for people
├── InvalidRequest                  the caller can fix it; `param` names the field
├── UnknownModel                    no such model; lists the ones there are
├── QueueFull                       admission refused; has `retry_after_s`
│   └── DeadlineUnreachable         it would be late: refused now rather than late
├── IdempotencyConflict             the key was used for a different request
├── JobNotFound                     never existed, or its result has expired
├── JobCancelled                    somebody cancelled it
├── JobFailed                       it ended without a result; carries the recorded code
├── BackendError                    a batch failed; carries its job ids
│   └── OutOfMemory                 the device ran out of memory: a smaller batch may pass
├── BundleRejected                  hash or schema mismatch; the worker refuses to serve it
├── QueueUnavailable                Redis does not answer; nothing was accepted
└── ServerStartError                the embedded Valkey server cannot be started
"""

from collections.abc import Sequence
from typing import ClassVar


class ServiceError(Exception):
    """Base of everything the service raises on purpose."""

    code: ClassVar[str] = "service_error"

    @property
    def message(self) -> str:
        """Say what was expected, what arrived and what to do."""
        return str(self)


class InvalidRequest(ServiceError):
    """The request cannot be served as written; the caller can fix it.

    `code` is the general one unless a more exact one is given (for example "invalid_size").
    """

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.detail_code = code or self.code


class UnknownModel(ServiceError):
    """No model of that name is served here."""

    code = "model_not_found"

    def __init__(self, model: str, known: Sequence[str] = ()) -> None:
        offered = f"; available: {', '.join(known)}" if known else ""
        super().__init__(f"unknown model {model!r}{offered}")
        self.model = model
        self.known = tuple(known)


class QueueFull(ServiceError):
    """Admission was refused; no row of the request was stored.

    `scope` is "total" or "tenant", the limit that was hit.
    """

    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float, scope: str = "total") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.scope = scope


class DeadlineUnreachable(QueueFull):
    """The jobs would miss their deadline, as far as can be predicted; nothing was stored."""

    code = "deadline_unreachable"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s, scope="deadline")


class IdempotencyConflict(ServiceError):
    """The idempotency key belongs to an earlier, different request."""

    code = "idempotency_conflict"


class JobNotFound(ServiceError):
    """There is no job of this id: it never existed, or its result has expired."""

    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id!r} not found: no such id, or its result has expired")
        self.job_id = job_id


class JobCancelled(ServiceError):
    """The job was cancelled before it had a result."""

    code = "job_cancelled"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id!r} was cancelled")
        self.job_id = job_id


class JobFailed(ServiceError):
    """The job ended without a result; `error_code` is what the worker or the queue recorded."""

    code = "job_failed"

    def __init__(self, job_id: str, error_code: str, message: str) -> None:
        super().__init__(f"job {job_id!r} failed ({error_code}): {message}")
        self.job_id = job_id
        self.error_code = error_code


class BackendError(ServiceError):
    """A backend could not run a batch; the jobs of `job_ids` have no result from it."""

    code = "backend_error"

    def __init__(self, message: str, *, job_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.job_ids = tuple(job_ids)


class OutOfMemory(BackendError):
    """The device ran out of memory on this batch; a smaller one may pass."""

    code = "out_of_memory"


class BundleRejected(ServiceError):
    """A model bundle is damaged or of another schema; it is not served."""

    code = "bundle_rejected"


class QueueUnavailable(ServiceError):
    """Redis does not answer or cannot accept writes."""

    code = "queue_unavailable"


class ServerStartError(ServiceError):
    """The embedded Valkey server cannot be found or started."""

    code = "server_start_error"
