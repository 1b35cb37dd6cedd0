"""The manifest: the contract between the distiller, which writes it, and the service, which reads it."""

from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 2

Sha256 = str


class Strict(BaseModel):
    """Base of every record here: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shape(Strict):
    """One size that the student offers: pixels, and frames, of which a picture has one."""

    width: int = Field(ge=8, le=8192, description="pixels")
    height: int = Field(ge=8, le=8192, description="pixels")
    frames: int = Field(default=1, ge=1, le=4096, description="frames of a video; a picture has one")


class Betas(Strict):
    """Discrete variance-preserving noise levels; betas are linear in their square roots (as in Stable Diffusion)."""

    beta_start: float = Field(gt=0, lt=1, description="the first step's")
    beta_end: float = Field(gt=0, lt=1, description="the last step's")
    num_timesteps: int = Field(default=1000, ge=2, le=100_000, description="levels that there are")
    snr_shift: float = Field(default=1.0, gt=0, description="divides the signal-to-noise ratio (CogVideoX)")
    zero_terminal_snr: bool = Field(default=False, description="the last level holds no signal (CogVideoX)")


class Guidance(Strict):
    """Whether classifier-free guidance happens at inference, or was baked in at this scale by distillation."""

    mode: Literal["none", "baked"] = Field(description="baked: one pass a step, guidance is learnt")
    scale: float = Field(default=1.0, description="the scale that was learnt")


class Latent(Strict):
    """How the denoiser's latents relate to pixels: decoder input = latents / scaling + shift."""

    channels: int = Field(ge=1, le=1024, description="of the latents")
    downscale: int = Field(ge=1, le=64, description="pixels a latent, in height and in width")
    frame_downscale: int = Field(
        default=1,
        ge=1,
        le=64,
        description="frames a latent",
    )
    first_frame_alone: bool = Field(
        default=True,
        description="the first frame has a latent of its own: 1 + 4 k frames are 1 + k latents (CogVideoX)",
    )
    scaling: float = Field(default=1.0, description="latents are divided by it before they are decoded")
    shift: float = Field(default=0.0, description="and this is added")

    def frames(self, frames: int) -> int:
        """Return how many latents a video's frames are.

        Raises:
            ValueError: no whole number of latents makes so many frames.
        """
        alone, each = int(self.first_frame_alone), self.frame_downscale
        if frames < 1 or (frames - alone) % each:
            raise ValueError(f"expected {'1 + ' if alone else ''}{each} k frames, got {frames}")
        return (frames - alone) // each + alone

    def check(self, shape: Shape, *, is_video: bool) -> None:
        """Refuse a shape that no latents are decoded to.

        Raises:
            ValueError: width or height is no whole number of latents, or there are frames of a picture.
        """
        if shape.width % self.downscale or shape.height % self.downscale:
            raise ValueError(f"expected multiples of {self.downscale}, got {shape.width}x{shape.height}")
        if not is_video and shape.frames != 1:
            raise ValueError(f"expected one frame of a picture, got {shape.frames}")
        self.frames(shape.frames)


class Text(Strict):
    """How a prompt becomes the token ids of one text encoder: cut and padded to max_length."""

    tokenizer: str = Field(description="file, in the format of Hugging Face tokenizers")
    max_length: int = Field(ge=1, le=4096, description="token ids a prompt")
    pad_id: int = Field(default=0, description="token id of padding")
    padding: Literal["encoded", "zeros"] = Field(
        default="encoded",
        description="zeros: what padding becomes is zeros, and nothing else depends on it, so that the graph may be "
        "run on as many ids as the longest prompt has; of a student with one text encoder only",
    )


class Components(Strict):
    """The three ONNX files.

    text_encoder: input_ids, attention_mask int64 [b, l] (of the second tokenizer: input_ids_2, attention_mask_2, and
        so on; a graph may do without masks) -> prompt_embeds [b, l, d], pooled_prompt_embeds [b, d].
    denoiser: latents, timestep [b], prompt_embeds, pooled_prompt_embeds (where it uses them) -> prediction.
    decoder: latents [b, c, h, w] or, of a video, [b, c, f, h, w] -> pixels in [-1, 1], [b, 3, ...].
    """

    text_encoder: str = Field(description="file: token ids to embeddings")
    denoiser: str = Field(description="file: one step's network")
    decoder: str = Field(description="file: latents to pixels")


class File(Strict):
    """What a file of the bundle must be."""

    sha256: Sha256 = Field(pattern=r"^[0-9a-f]{64}$", description="of its content, in hexadecimal")
    bytes: int = Field(ge=0, description="its size")


class Manifest(Strict):
    """Everything that is needed to run a student correctly, and to trace it to its teacher."""

    schema_version: Literal[2] = Field(description="of this format; 1 is read as well")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$", description="what requests call the student")
    version: int = Field(ge=1, description="a published version never changes")
    task: Literal["text-to-image", "text-to-video"] = Field(description="what it makes")
    family: str = Field(
        description="of its teacher: emoji, sdxl, sd3, cogvideox; for people, nothing depends on it"
    )
    prediction: Literal["x0", "eps", "v", "flow"] = Field(description="what the denoiser's output means")
    schedule: Literal["rectified-flow", "variance-preserving"] | Betas = Field(
        description="how data and noise are mixed at a time"
    )
    time_steps: tuple[float, ...] = Field(
        min_length=1,
        max_length=1000,
        description="the student's own steps: times from 1 (noise) down to above 0",
    )
    step_schedules: dict[int, tuple[float, ...]] = Field(
        default={}, description="other numbers of steps that it was trained for, and their times"
    )
    timestep_scale: float = Field(gt=0, description="the network is told time t as t times this")
    timestep_offset: float = Field(default=0.0, description="plus this")
    guidance: Guidance = Field(description="classifier-free guidance")
    shapes: tuple[Shape, ...] = Field(
        min_length=1, description="sizes that are offered; the first is the default"
    )
    fps: float | None = Field(default=None, gt=0, le=1000, description="frames a second; of videos only")
    max_batch: int = Field(ge=1, le=1024, description="rows that the graphs take at once")
    latent: Latent = Field(description="how latents relate to pixels")
    text: tuple[Text, ...] = Field(min_length=1, max_length=8, description="one for each text encoder")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(description="of the graphs' arithmetic")
    components: Components = Field(description="the graphs")
    files: dict[str, File] = Field(description="every file of the bundle but the manifest, by its path")
    parents: dict[str, Sha256] = Field(
        default={}, description="hashes of what it was made from: teacher, recipe, pairs"
    )
    licence: str = Field(description="of the weights")
    attribution: str = Field(default="", description="what the licence asks to be named")
    metrics: dict[str, float] = Field(default={}, description="of the evaluation, as shares of the teacher's")
    parity: dict[str, float | bool] = Field(default={}, description="what the parity gate measured at export")
    calibration: dict[str, dict[int, float]] = Field(
        default={},
        description="backend -> batch size -> milliseconds of all steps, on its exporter's machine",
    )
    batch_invariant: dict[str, bool] = Field(
        default={}, description="backend -> equal bytes in any batch, on its exporter's machine"
    )

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        check_times("time_steps", self.time_steps)
        for count, times in self.step_schedules.items():
            check_times("step_schedules", times)
            if count != len(times) or count == len(self.time_steps):
                raise ValueError(
                    f"step_schedules: expected a number of steps other than that of time_steps, with as many times, "
                    f"got {count}: {times}"
                )
        for shape in self.shapes:
            try:
                self.latent.check(shape, is_video=self.is_video)
            except ValueError as error:
                raise ValueError(f"shapes: {error}") from None
        if len(self.text) > 1 and any(text.padding == "zeros" for text in self.text):
            raise ValueError("text: expected padding 'zeros' of one text encoder alone, got several encoders")
        if (self.fps is not None) != self.is_video:
            raise ValueError(f"fps: expected of a video and only there, got {self.fps} for {self.task}")
        named = [*self.components.model_dump().values(), *(text.tokenizer for text in self.text)]
        for name in named:
            if name not in self.files:
                raise ValueError(f"files: expected an entry for {name}, which the manifest uses")
        for name in self.files:
            if name.startswith("/") or ".." in name.split("/") or "\\" in name or name == "manifest.json":
                raise ValueError(f"files: expected a path inside the bundle, got {name!r}")
        return self

    @property
    def is_video(self) -> bool:
        """Tell whether the student makes videos."""
        return self.task == "text-to-video"

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """Return the latents' shape without the batch: (c, h, w) of a picture, (c, f, h, w) of a video."""
        latent = self.latent
        plane = (height // latent.downscale, width // latent.downscale)
        if not self.is_video:
            return (latent.channels, *plane)
        return (latent.channels, latent.frames(frames), *plane)

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


def check_times(name: str, times: tuple[float, ...]) -> None:
    """Refuse times that no student is sampled at; `name` is what the message calls them.

    Raises:
        ValueError: there are none, they do not descend, or one is not in (0, 1].
    """
    if not times or any(not 0 < t <= 1 for t in times) or any(a <= b for a, b in pairwise(times)):
        raise ValueError(f"{name}: expected descending times in (0, 1], got {times}")
