"""What travels through the queue: a picture to make, and what became of it. JSON bytes, both ways.

The API writes tasks and reads outcomes; the worker reads tasks and writes outcomes.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flashbulb_service.errors import NewerMessage
from flashbulb_service.formats import DEFAULT_QUALITY, ImageFormat, VideoFormat
from flashbulb_service.wire import WIRE

Task = Literal["text-to-image", "text-to-video"]
MAX_SEED = 2**63 - 1
MAX_PARTIAL_IMAGES = 3


class Message(BaseModel):
    """Base of what travels as JSON bytes, perhaps to another version of the service: see `wire`."""

    # An error of validation goes into the log and to clients: it must not quote somebody's prompt.
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    wire: int = Field(default=1, ge=1)  # the oldest version that understands this message

    def to_bytes(self) -> bytes:
        """Write the message as JSON, without what has its default: older versions refuse names they do not know."""
        return self.model_dump_json(exclude_defaults=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a message.

        Raises:
            ValueError: the bytes are no message of this kind.
            NewerMessage: a later version wrote it, for its own kind only.
        """
        return cls.model_validate_json(data)

    @model_validator(mode="before")
    @classmethod
    def _check_wire(cls, data: Any) -> Any:
        wire = data.get("wire", 1) if isinstance(data, dict) else 1
        if isinstance(wire, int) and wire > WIRE:
            raise NewerMessage(
                f"expected a message of wire version {WIRE} or before, got {wire}: upgrade this one"
            )
        return data


class ImageTask(Message):
    """One picture or video to make: one row of a batch."""

    prompt: str
    seed: int = Field(ge=0, le=MAX_SEED)
    index: int = Field(ge=0)  # which image of its request; the noise is drawn from (seed, index)
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    frames: int = Field(default=1, ge=1)
    fps: float | None = Field(default=None, gt=0)  # of a video; None: a picture
    steps: int | None = Field(default=None, ge=1)  # None: the student's own number
    partial_images: int = Field(default=0, ge=0, le=MAX_PARTIAL_IMAGES)
    bundle_sha256: str | None = None  # the student that was asked for; None: whatever has the name
    image_format: ImageFormat | VideoFormat = "png"
    quality: int = Field(default=DEFAULT_QUALITY, ge=0, le=100)
    request_id: str = Field(default="", max_length=64, pattern=r"^[A-Za-z0-9_-]*$")  # for the log only
    traceparent: str = Field(
        default="", max_length=64, pattern=r"^[0-9a-f-]*$"
    )  # "": its request is not traced


class Preview(Message):
    """An estimate of a picture while it is drawn, as those who watch its request are told."""

    file: str  # result id in the result store
    partial_image_index: int = Field(ge=0, lt=MAX_PARTIAL_IMAGES)
    step: int = Field(ge=1)  # steps done
    steps: int


class StepDone(Message):
    """How far a video is, as those who watch its request are told."""

    step: int = Field(ge=1)  # steps done
    steps: int


class ImageOutcome(Message):
    """Where a finished picture or video lies and what it cost."""

    file: str  # result id in the result store
    batch_size: int = Field(ge=1)
    batch_ms: float  # wall time of the batch that made it
    encode_ms: float
    stages_ms: dict[str, float] = Field(default_factory=dict)  # parts of batch_ms
    bundle_sha256: str  # of the manifest: traces the picture to the student and its parents
    backend: str = "unknown"  # what drew it


class RequestRecord(Message):
    """What the API keeps of a request, to tell of it and to answer it again in the same words."""

    task: Task
    model: str  # name@version
    prompt: str
    seed: int
    n: int
    width: int
    height: int
    steps: int
    response_format: Literal["b64_json", "url"]
    image_format: ImageFormat | VideoFormat
    quality: str
    frames: int = 1
    fps: float | None = None  # of a video
    remixed_from: str | None = None  # id of a request
    metadata: dict[str, str] = Field(default_factory=dict)
    webhook_url: str | None = None
    webhook_events: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Return how long a video is."""
        return self.frames / self.fps if self.fps else 0.0

    @property
    def size(self) -> str:
        """Return the size as it is written on the wire."""
        return f"{self.width}x{self.height}"
