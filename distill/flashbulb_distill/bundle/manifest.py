"""The manifest: the contract between the distiller, which writes it, and the service, which reads it."""

from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1

Sha256 = str


class Strict(BaseModel):
    """Base of every record here: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shape(Strict):
    """One picture size that the student offers, in pixels."""

    width: int = Field(ge=8, le=8192)
    height: int = Field(ge=8, le=8192)


class Guidance(Strict):
    """Whether classifier-free guidance happens at inference, or was baked in at this scale by distillation."""

    mode: Literal["none", "baked"]
    scale: float = 1.0


class Latent(Strict):
    """How the denoiser's latents relate to pixels: decoder input = latents / scaling + shift."""

    channels: int = Field(ge=1, le=1024)
    downscale: int = Field(ge=1, le=64)
    scaling: float = 1.0
    shift: float = 0.0


class Text(Strict):
    """How a prompt becomes token ids: cut and padded to max_length."""

    tokenizer: str
    max_length: int = Field(ge=1, le=4096)
    pad_id: int = 0


class Components(Strict):
    """The three ONNX files."""

    text_encoder: str
    denoiser: str
    decoder: str


class File(Strict):
    """What a file of the bundle must be."""

    sha256: Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(Strict):
    """Everything that is needed to run a student correctly, and to trace it to its teacher."""

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    version: int = Field(ge=1)
    task: Literal["text-to-image", "text-to-video"]
    family: str
    prediction: Literal["x0", "eps", "v", "flow"]
    schedule: Literal["rectified-flow", "variance-preserving"]
    time_steps: tuple[float, ...] = Field(min_length=1, max_length=1000)
    timestep_scale: float = Field(gt=0)
    guidance: Guidance
    shapes: tuple[Shape, ...] = Field(min_length=1)
    max_batch: int = Field(ge=1, le=1024)
    latent: Latent
    text: Text
    dtype: Literal["float32", "float16", "bfloat16"]
    components: Components
    files: dict[str, File]
    parents: dict[str, Sha256] = {}
    licence: str
    attribution: str = ""
    metrics: dict[str, float] = {}
    parity: dict[str, float | bool] = {}
    calibration: dict[str, dict[int, float]] = {}
    batch_invariant: dict[str, bool] = {}

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        steps = self.time_steps
        if any(not 0 < t <= 1 for t in steps) or any(a <= b for a, b in pairwise(steps)):
            raise ValueError(f"time_steps: expected descending times in (0, 1], got {steps}")
        named = [*self.components.model_dump().values(), self.text.tokenizer]
        for name in named:
            if name not in self.files:
                raise ValueError(f"files: expected an entry for {name}, which the manifest uses")
        for name in self.files:
            if name.startswith("/") or ".." in name.split("/") or "\\" in name or name == "manifest.json":
                raise ValueError(f"files: expected a path inside the bundle, got {name!r}")
        return self
