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
    step_schedules: dict[int, tuple[float, ...]] = {}  # other numbers of steps -> their times
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
        _check_times("time_steps", self.time_steps)
        for count, times in self.step_schedules.items():
            _check_times("step_schedules", times)
            if count != len(times) or count == len(self.time_steps):
                raise ValueError(
                    f"step_schedules: expected a number of steps other than that of time_steps, with as many times, "
                    f"got {count}: {times}"
                )
        named = [*self.components.model_dump().values(), self.text.tokenizer]
        for name in named:
            if name not in self.files:
                raise ValueError(f"files: expected an entry for {name}, which the manifest uses")
        for name in self.files:
            if name.startswith("/") or ".." in name.split("/") or "\\" in name or name == "manifest.json":
                raise ValueError(f"files: expected a path inside the bundle, got {name!r}")
        return self

    @property
    def offered_steps(self) -> tuple[int, ...]:
        """Return the numbers of steps that the student was trained for, ascending."""
        return tuple(sorted({len(self.time_steps), *self.step_schedules}))

    def times(self, num_steps: int | None = None) -> tuple[float, ...]:
        """Return the time steps of a number of steps; None is the student's own.

        Raises:
            ValueError: the student was not trained for that number.
        """
        if num_steps is None or num_steps == len(self.time_steps):
            return self.time_steps
        if num_steps not in self.step_schedules:
            offered = ", ".join(map(str, self.offered_steps))
            raise ValueError(
                f"expected a number of steps that {self.name} offers ({offered}), got {num_steps}"
            )
        return self.step_schedules[num_steps]


def _check_times(name: str, times: tuple[float, ...]) -> None:
    if not times or any(not 0 < t <= 1 for t in times) or any(a <= b for a, b in pairwise(times)):
        raise ValueError(f"{name}: expected descending times in (0, 1], got {times}")
