"""Every error the service raises on purpose. HTTP status codes are assigned in the API, nowhere else.

ServiceError                        has a stable `code` and a message for people
├── InvalidRequest                  the caller can fix it; `param` names the field
├── UnknownModel                    no such model; lists the ones there are
│   └── ModelUnloaded               an operator has unloaded it
├── QueueFull                       admission refused; has `retry_after_s`
│   ├── DeadlineUnreachable         it would be late: refused now rather than late
│   └── ConcurrencyExceeded         an API key has as many live jobs as it may
├── ModelDraining                   an operator lets a model run empty; nothing new is taken
├── InvalidApiKey                   no key, or none that is good
├── MissingScope                    the key may not do this
├── KeyNotFound                     there is no API key of this id
├── RateLimited                     an API key sent more requests than it may; has `retry_after_s`
├── BudgetExceeded                  an API key has used its device time; has `retry_after_s`
├── IdempotencyConflict             the key was used for a different request
├── JobNotFound                     never existed, or its result has expired
├── JobCancelled                    somebody cancelled it
├── JobFailed                       it ended without a result; carries the recorded code
├── BackendError                    a batch failed; carries its job ids
│   └── OutOfMemory                 the device ran out of memory: a smaller batch may pass
├── BackendUnavailable              the backend that was asked for cannot run a model here
├── BundleRejected                  hash or schema mismatch; the worker refuses to serve it
├── ModelUnavailable                a worker cannot load a model
├── BundleReplaced                  a job's model was exported again under the same version
├── ModelStoreUnavailable           the store that bundles are fetched from does not answer
├── NewerMessage                    a later version of the service wrote it, for its own kind only
├── QueueUnavailable                Redis does not answer; nothing was accepted
└── ServerStartError                the embedded Valkey server cannot be started
"""

from collections.abc import Sequence
from typing import ClassVar


class ServiceError(Exception):
    """Base of everything the service raises on purpose."""

    code: ClassVar[str] = "service_error"
    exit_code: ClassVar[int] = 1  # of a command that it ends; 2 where what the caller gave cannot be used

    @property
    def message(self) -> str:
        """Say what was expected, what arrived and what to do."""
        return str(self)


class InvalidRequest(ServiceError):
    """The request cannot be served as written; the caller can fix it.

    `code` is the general one unless a more exact one is given (for example "invalid_size").
    """

    code = "invalid_request"
    exit_code = 2

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.detail_code = code or self.code


class UnknownModel(ServiceError):
    """No model of that name is served here."""

    code = "model_not_found"
    exit_code = 2

    def __init__(self, model: str, known: Sequence[str] = ()) -> None:
        offered = f"; available: {', '.join(known)}" if known else ""
        super().__init__(f"unknown model {model!r}{offered}")
        self.model = model
        self.known = tuple(known)


class ModelUnloaded(UnknownModel):
    """An operator has unloaded the model."""

    code = "model_unloaded"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.args = (
            f"model {model!r} was unloaded: use another, or load it with 'flashbulb models load {model}'",
        )


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


class ConcurrencyExceeded(QueueFull):
    """An API key has as many live jobs as it may have."""

    code = "concurrency_exceeded"


class ModelDraining(ServiceError):
    """An operator lets the model run empty."""

    code = "model_draining"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"model {model!r} is being drained and takes no new work: use another, or come later"
        )
        self.model = model


class InvalidApiKey(ServiceError):
    """There is no API key in the request, or none that is good."""

    code = "invalid_api_key"


class MissingScope(ServiceError):
    """The API key is good, but not for this."""

    code = "missing_scope"


class KeyNotFound(ServiceError):
    """There is no API key of this id, or it was revoked."""

    code = "key_not_found"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"no API key {key_id[:80]!r}: the id is wrong, or it was revoked")


class RateLimited(ServiceError):
    """An API key sent more requests than its rate allows."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BudgetExceeded(ServiceError):
    """An API key has used the device time of its period."""

    code = "budget_exceeded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


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


class BackendUnavailable(ServiceError):
    """The backend that was asked for cannot run a model on this machine, or none can."""

    code = "backend_unavailable"


class BundleRejected(ServiceError):
    """A model bundle is damaged or of another schema; it is not served."""

    code = "bundle_rejected"


class ModelUnavailable(ServiceError):
    """A worker cannot load a model: its files or its runtime fail, or it is larger than the memory for models."""

    code = "model_unavailable"

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"model {model!r} cannot be loaded: {reason}")
        self.model = model


class BundleReplaced(ServiceError):
    """The model that a job asked for was replaced by another one of the same name and version."""

    code = "model_replaced"


class ModelStoreUnavailable(ServiceError):
    """The store that bundles are fetched from does not answer, or refuses."""

    code = "model_store_unavailable"


class NewerMessage(ServiceError):
    """A later version of the service wrote what is to be read here; another process may understand it."""

    code = "newer_version"


class QueueUnavailable(ServiceError):
    """Redis does not answer or cannot accept writes."""

    code = "queue_unavailable"


class ServerStartError(ServiceError):
    """The embedded Valkey server cannot be found or started."""

    code = "server_start_error"


def without_frames(error: Exception) -> Exception:
    """Return an error that keeps none of the frames that it passed, nor what it came from.

    Whoever keeps the error is itself among them, and the frames keep the batch: a cycle, whose arrays only Python's
    collector would find, thousands of batches later.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
