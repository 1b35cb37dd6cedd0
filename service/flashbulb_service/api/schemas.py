"""The body of POST /v1/images/generations, as OpenAI's clients send it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flashbulb_service.formats import ImageFormat
from flashbulb_service.tasks import MAX_SEED

MAX_IMAGES = 10

# OpenAI fields that mean nothing to a distilled student. Their vocabulary grows monthly; clients send them
# out of habit, so they are accepted and named in a warning header.
IGNORED = ("background", "complexity", "moderation", "partial_images", "quality", "stream", "style")

# Values among them that ask for something we would not deliver: a silent 200 would be a lie.
REFUSED: dict[str, tuple[Any, ...]] = {"background": ("transparent",), "stream": (True,)}


class ImagesRequest(BaseModel):
    """What to draw. A field set to null counts as left out; a field nobody defines is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(min_length=1)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_IMAGES, strict=True)
    size: str = "auto"
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, strict=True)
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: ImageFormat = "png"
    output_compression: int = Field(default=100, ge=0, le=100, strict=True)
    user: str | None = None
    safety_identifier: str | None = None

    background: Any = None
    complexity: Any = None
    moderation: Any = None
    partial_images: Any = None
    quality: Any = None
    stream: Any = None
    style: Any = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data

    @property
    def ignored(self) -> tuple[str, ...]:
        """Return the fields that were sent and have no effect."""
        return tuple(name for name in IGNORED if getattr(self, name) is not None)
