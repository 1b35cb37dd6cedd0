"""The bodies of the routes that draw, as OpenAI's clients send them, with our extensions."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flashbulb_service.formats import ImageFormat
from flashbulb_service.tasks import MAX_SEED

MAX_IMAGES = 10
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_PRIORITY = 10
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_KEY_CHARS = 200

# OpenAI fields that change nothing here, whatever their value. Their vocabulary grows monthly and clients send
# them out of habit, so they are accepted and named in a warning header.
IGNORED = ("complexity", "frame_count", "frame_duration_ms", "moderation", "style", "svg")

# The same thing under the names that other servers gave it.
ALIASES = {
    "rng_seed": "seed",
    "num_inference_steps": "steps",
    "true_cfg_scale": "guidance_scale",
}

# Names that people send, whose nearest spelling would mislead.
HINTS = {
    "width": "use size='WIDTHxHEIGHT'",
    "height": "use size='WIDTHxHEIGHT'",
    "num_frames": "this route draws still pictures; videos are made at POST /v1/videos",
    "fps": "this route draws still pictures; videos are made at POST /v1/videos",
    "seconds": "this route draws still pictures; videos are made at POST /v1/videos",
}


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise PydanticCustomError("nul", "expected text, got a NUL character")
    return value


Prompt = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]


class DrawRequest(BaseModel):
    """What every route that draws understands. A field set to null counts as left out; an unknown one is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Prompt
    model: str | None = Field(default=None, max_length=200)
    size: str = Field(default="auto", max_length=32)
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=512)

    # ours
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, strict=True)
    steps: int | None = Field(default=None, ge=1, le=1000, strict=True)
    guidance_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    negative_prompt: str | None = None
    deadline_ms: int | None = Field(default=None, ge=1, le=MAX_DEADLINE_MS, strict=True)
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, strict=True)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=MAX_METADATA)
    webhook_url: str | None = Field(default=None, max_length=2_000)
    webhook_events: tuple[Literal["job.completed", "job.failed", "job.cancelled"], ...] = Field(
        default=("job.completed", "job.failed", "job.cancelled"), min_length=1, max_length=3
    )
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=MAX_KEY_CHARS)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_aliases(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = {key: value for key, value in data.items() if value is not None}
        for alias, name in ALIASES.items():
            if alias in fields:
                value = fields.pop(alias)
                if fields.setdefault(name, value) != value:
                    raise PydanticCustomError(
                        "alias_conflict",
                        "{alias} is another name of {name}: expected one of them, got both",
                        {"alias": alias, "name": name},
                    )
        return fields

    @field_validator("metadata")
    @classmethod
    def _bound_metadata(cls, value: dict[str, str]) -> dict[str, str]:
        try:
            "".join([*value, *value.values()]).encode()
        except UnicodeEncodeError as error:
            raise PydanticCustomError("string_unicode", "expected text that UTF-8 can hold") from error
        for key, text in value.items():
            if len(key) > MAX_METADATA_KEY_CHARS or len(text) > MAX_METADATA_VALUE_CHARS:
                raise PydanticCustomError(
                    "metadata",
                    f"expected keys of at most {MAX_METADATA_KEY_CHARS} and values of at most "
                    f"{MAX_METADATA_VALUE_CHARS} characters",
                )
        return value


class ImagesRequest(DrawRequest):
    """Pictures to draw."""

    n: int = Field(default=1, ge=1, le=MAX_IMAGES, strict=True)
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: ImageFormat = "png"
    output_compression: int = Field(default=100, ge=0, le=100, strict=True)
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = "auto"
    background: Literal["auto", "opaque", "transparent"] = "auto"
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None
    stream: bool = Field(default=False, strict=True)
    partial_images: int = Field(default=0, ge=0, le=3, strict=True)
    size_policy: Literal["exact", "nearest"] = "exact"  # ours

    # OpenAI's, without effect
    complexity: Any = None
    frame_count: Any = None
    frame_duration_ms: Any = None
    svg: Any = None

    @property
    def ignored(self) -> tuple[str, ...]:
        """Return the fields that were sent and have no effect on any student."""
        return tuple(name for name in IGNORED if getattr(self, name) is not None)


class JobRequest(ImagesRequest):
    """A job: what to draw, and as which task."""

    task: Literal["text-to-image"] = "text-to-image"


class VideosRequest(DrawRequest):
    """A video to make. `seconds` is text in OpenAI's clients; a number is taken as well."""

    seconds: str | int | float | None = Field(default=None)
    input_reference: Any = None

    # ours
    fps: float | None = Field(default=None, gt=0, le=1000, allow_inf_nan=False)
    num_frames: int | None = Field(default=None, ge=1, le=100_000, strict=True)


class RemixRequest(BaseModel):
    """The same video again with another prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Prompt


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error of every route."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request cannot be served as written",
        401: "There is no API key, or none that is good",
        403: "The API key may not do this",
        404: "No such model, job, video, picture or key",
        405: "Another method is expected",
        408: "The request did not arrive in time",
        409: "The key was used for another request, or the job was cancelled",
        413: "The body is too large",
        415: "The body is of a type that is not read here",
        416: "The range lies outside the file",
        421: "The Host header names another server",
        429: "The queue is full, or the API key has used up what it may: see retry-after",
        500: "The work failed, or the server did",
        503: "The queue does not answer, or too many uploads come at once: see retry-after",
        504: "Not finished within the time allowed",
    }.items()
}
