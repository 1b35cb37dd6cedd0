"""Every error as the OpenAI body ``{"error": {message, type, param, code}}``.

`describe` is the one place where an error gets its HTTP status.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from flashbulb_service.api.schemas import ALIASES, HINTS, ImagesRequest
from flashbulb_service.errors import (
    BudgetExceeded,
    IdempotencyConflict,
    InvalidApiKey,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    JobNotFound,
    KeyNotFound,
    MissingScope,
    ModelDraining,
    ModelUnloaded,
    NewerMessage,
    QueueFull,
    QueueUnavailable,
    RateLimited,
    ServiceError,
    UnknownModel,
)


class NotReady(ServiceError):
    """This process is up, but a request would not be answered yet."""

    code = "not_ready"


class ResultNotFound(ServiceError):
    """There is no picture of this name: it never existed, or its time is over."""

    code = "result_not_found"


class BodyTooLarge(ServiceError):
    """The request body is larger than the server reads."""

    code = "body_too_large"


class TooManyUploads(ServiceError):
    """Large bodies of other requests take what this process has for them."""

    code = "too_many_uploads"


class BodyTimeout(ServiceError):
    """The body did not arrive within the time a client has for it."""

    code = "request_timeout"


class WrongHost(ServiceError):
    """The Host header names another server."""

    code = "wrong_host"


class UnsupportedMedia(ServiceError):
    """The body is of a type that this route does not read."""

    code = "unsupported_media_type"


class VideoNotFound(ServiceError):
    """There is no video of this id: it never existed, was deleted, or its time is over."""

    code = "video_not_found"


class RangeNotSatisfiable(ServiceError):
    """The range of bytes that was asked for lies outside the file."""

    code = "range_not_satisfiable"

    def __init__(self, size: int) -> None:
        """Tell the size of the file in bytes."""
        super().__init__(f"expected a range of bytes inside the file, which has {size}")
        self.size = size


class TooManyStreams(ServiceError):
    """This process serves as many event streams as it may, in all or of one key."""

    code = "too_many_streams"


class RequestTimeout(ServiceError):
    """The pictures did not come within the time a request may take."""

    code = "deadline_exceeded"


class ClientGone(ServiceError):
    """The client closed the connection; nobody reads this answer."""

    code = "client_closed_request"


@dataclass(frozen=True)
class ErrorAnswer:
    """What goes over the wire for an error."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """Return OpenAI's error type for the status."""
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, dict[str, str | None]]:
        """Build the body; what came from the client is cut short and made printable."""
        return {
            "error": {
                "message": _printable(self.message, MAX_MESSAGE_CHARS),
                "type": self.type,
                "param": None if self.param is None else _printable(self.param, MAX_PARAM_CHARS),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Build the response."""
        return JSONResponse(self.body(), self.status, dict(self.headers))


MAX_MESSAGE_CHARS = 1_000
MAX_PARAM_CHARS = 200


def _printable(text: str, limit: int) -> str:
    """Escape what UTF-8 or one line cannot hold (lone surrogates, control characters), and cut."""
    safe = "".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in text[:limit])
    return safe if len(text) <= limit else safe + "…"


# A client library retries some statuses by itself; where that cannot help, it is told so.
NO_RETRY: Mapping[str, str] = {"x-should-retry": "false"}


def describe(error: Exception) -> ErrorAnswer:
    """Turn any error into its answer; here, and only here, errors get their HTTP status."""
    match error:
        case RequestValidationError():
            return describe(first_problem(error.errors()))
        case InvalidRequest():
            return ErrorAnswer(400, error.detail_code, error.message, error.param)
        case ModelUnloaded():
            return ErrorAnswer(503, error.code, error.message, "model", {**_retry_after(10.0), **NO_RETRY})
        case UnknownModel():
            return ErrorAnswer(404, error.code, error.message, "model")
        case InvalidApiKey():
            return ErrorAnswer(401, error.code, error.message, headers={"www-authenticate": "Bearer"})
        case MissingScope():
            return ErrorAnswer(403, error.code, error.message)
        case JobNotFound() | ResultNotFound() | VideoNotFound() | KeyNotFound():
            return ErrorAnswer(404, error.code, error.message)
        case IdempotencyConflict():
            return ErrorAnswer(409, error.code, error.message, "Idempotency-Key", NO_RETRY)
        case JobCancelled():
            return ErrorAnswer(409, error.code, error.message, headers=NO_RETRY)
        case BodyTimeout():
            return ErrorAnswer(408, error.code, error.message, headers={"connection": "close"})
        case WrongHost():
            return ErrorAnswer(421, error.code, error.message, headers=NO_RETRY)
        case RangeNotSatisfiable():
            return ErrorAnswer(
                416, error.code, error.message, headers={"content-range": f"bytes */{error.size}"}
            )
        case UnsupportedMedia():
            return ErrorAnswer(415, error.code, error.message)
        case TooManyStreams():
            return ErrorAnswer(429, error.code, error.message, headers=_retry_after(5.0))
        case TooManyUploads():
            return ErrorAnswer(503, error.code, error.message, headers=_retry_after(5.0))
        case BodyTooLarge():
            return ErrorAnswer(413, error.code, error.message)
        case BudgetExceeded():  # hours may pass: a client library's retry would not help
            return ErrorAnswer(
                429, error.code, error.message, headers={**_retry_after(error.retry_after_s), **NO_RETRY}
            )
        case ModelDraining():
            return ErrorAnswer(503, error.code, error.message, "model", {**_retry_after(10.0), **NO_RETRY})
        case QueueFull() | RateLimited():
            return ErrorAnswer(429, error.code, error.message, headers=_retry_after(error.retry_after_s))
        case ClientGone():
            return ErrorAnswer(499, error.code, error.message)
        case JobFailed(error_code="deadline_exceeded"):
            return ErrorAnswer(504, error.error_code, error.message, headers=NO_RETRY)
        case JobFailed(error_code="content_policy_violation"):
            return ErrorAnswer(400, error.error_code, error.message, "prompt", NO_RETRY)
        case JobFailed():
            return ErrorAnswer(500, error.error_code, error.message)
        case QueueUnavailable() | NotReady() | NewerMessage():
            return ErrorAnswer(503, error.code, error.message, headers=_retry_after(1.0))
        case RequestTimeout():
            return ErrorAnswer(504, error.code, error.message, headers=NO_RETRY)
        case ServiceError():
            return ErrorAnswer(500, error.code, error.message)
        case HTTPException(status_code=404):
            return ErrorAnswer(404, "route_not_found", "no such route: see /openapi.json for those there are")
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow", "another method")
            return ErrorAnswer(
                405, "method_not_allowed", f"this route expects {allowed}", headers=error.headers or {}
            )
        case HTTPException(status_code=413):
            return describe(BodyTooLarge("request body too large: send a shorter one"))
        case HTTPException(status_code=400, detail="There was an error parsing the body"):
            return ErrorAnswer(
                400, "invalid_json", "expected a JSON body of text in UTF-8, nested less deeply"
            )
        case HTTPException():
            return ErrorAnswer(
                error.status_code, "http_error", str(error.detail), headers=error.headers or {}
            )
        case _:
            return ErrorAnswer(
                500, "internal_error", "internal error: the server's log has it under this request id"
            )


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Answer a request with its error, and count those that a limit refused."""
    answer = describe(error)
    if answer.status == 429:
        request.app.state.context.metrics.shed(answer.code)
    return answer.response()


def _retry_after(seconds: float) -> dict[str, str]:
    """Say when to come again; the SDK prefers the exact header, proxies know the whole-second one."""
    return {"retry-after": str(max(1, round(seconds))), "retry-after-ms": str(max(1, round(seconds * 1000)))}


@dataclass(frozen=True)
class _Problem:
    """How a pydantic error type is told to the caller."""

    code: str
    text: str


_PROBLEMS: Mapping[str, _Problem] = {
    "missing": _Problem("missing_required_parameter", "expected this field, got none"),
    "json_invalid": _Problem("invalid_json", "expected a JSON body, got {error}"),
    "string_too_short": _Problem(
        "empty_string", "expected at least {min_length} character, got an empty string"
    ),
    "string_too_long": _Problem("string_above_max_length", "expected at most {max_length} characters"),
    "greater_than_equal": _Problem("integer_below_min_value", "expected at least {ge}, got {input}"),
    "less_than_equal": _Problem("integer_above_max_value", "expected at most {le}, got {input}"),
    "string_unicode": _Problem("invalid_value", "expected text that UTF-8 can hold, got a lone surrogate"),
    "literal_error": _Problem("invalid_value", "expected {expected}, got {input!r}"),
}


class _Kept(dict[str, Any]):
    """A mapping for format_map that leaves unknown names visible instead of failing."""

    missing_text: ClassVar[str] = "?"

    def __missing__(self, key: str) -> str:
        return self.missing_text


def first_problem(
    problems: Sequence[Mapping[str, Any]], known: Iterable[str] = ImagesRequest.model_fields
) -> InvalidRequest:
    """Tell the first thing wrong with a request: one error at a time, as OpenAI does. known: its fields."""
    problem = problems[0]
    place = [str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(place) or None
    kind = problem["type"]
    if kind == "extra_forbidden":
        return unknown_parameter(place[-1], known)
    if kind == "json_invalid":
        param = None
    if kind in ("model_attributes_type", "dict_type", "model_type"):
        message = "expected a JSON object with the header 'Content-Type: application/json'"
        return InvalidRequest(message, code="invalid_body")
    told = _PROBLEMS.get(kind)
    if told is None:
        code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
        return InvalidRequest(f"{param}: {problem['msg']}", param=param, code=code)
    text = told.text.format_map(_Kept(problem.get("ctx", {}), input=problem.get("input")))
    return InvalidRequest(f"{param or 'body'}: {text}", param=param, code=told.code)


def unknown_parameter(name: str, known: Iterable[str]) -> InvalidRequest:
    """Refuse a field that nobody defines, with the nearest name that exists."""
    if name in HINTS:
        return InvalidRequest(
            f"unknown parameter {name!r}: {HINTS[name]}", param=name, code="unknown_parameter"
        )
    near = get_close_matches(name[:64], [*known, *ALIASES], n=1)
    hint = f": did you mean {near[0]!r}?" if near else ": remove it"
    return InvalidRequest(f"unknown parameter {name[:64]!r}{hint}", param=name, code="unknown_parameter")
