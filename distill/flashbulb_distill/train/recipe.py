"""A recipe: one YAML file that says everything about a run. Frozen, and an unknown key is an error."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..bundle import Shape, check_times
from ..core.times import adm_times
from ..errors import UsageError

STAGES = ("regression", "adp", "adm", "dmd", "ladd", "lcm", "variety")  # in their order
WITH_FAKE = ("adm", "dmd")  # those that train a fake score

SAVE_EVERY = 100  # steps from checkpoint to checkpoint

MAX_TOLERANCE = (
    1e-3  # of a bundle's parity gate: float32 graphs differ by 5e-5 at most, a changed weight by more
)

IDA = "by how much each student update pulls the fake score along; SenseFlow has .03, the paper nothing"


class Strict(BaseModel):
    """Base of every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PairsRecipe(Strict):
    """How the teacher's ODE pairs are made."""

    count: int = Field(ge=1)
    num_steps: int = Field(ge=1)
    order: Literal[1, 2] = Field(
        default=1,
        description="of the solver: 1 is Euler or DDIM, 2 is Adams-Bashforth: as exact in fewer steps",
    )
    guidance: float = Field(ge=1)
    batch_size: int = Field(default=64, ge=1)
    start_after: int | None = Field(
        default=None,
        ge=1,
        description="pairs with which training may begin, while another process makes the others; null: all",
    )

    @model_validator(mode="after")
    def _starts(self) -> "PairsRecipe":
        if self.start_after is not None and self.start_after > self.count:
            raise ValueError(f"start_after: expected at most the count, {self.count}, got {self.start_after}")
        return self


class Rates(Strict):
    """Learning rates of the roles, and Adam's betas."""

    student: float = Field(gt=0)
    heads: float = Field(gt=0)
    fake: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.0, 0.99)


class StageRecipe(Strict):
    """What every training stage needs."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    ema: float = Field(default=0.995, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)

    @property
    def batches(self) -> dict[str, int]:
        """Rows of what is shared equally among processes, by key."""
        return {"batch_size": self.batch_size}

    @property
    def average_from(self) -> int:
        """The step from which the student moves, and its average with it."""
        return 0

    def rate_at(self, step: int) -> float:
        """Return what the learning rates are multiplied by in a step, counted from 0."""
        return 1.0


class RegressionRecipe(StageRecipe):
    """Regression on the pairs, before ADP; the paper's ablation A1 when it stands alone."""

    rate: float = Field(gt=0)
    decay_steps: int = Field(
        default=0, ge=0, description="last steps, in which the rate falls evenly to zero"
    )
    betas: tuple[float, float] = (0.9, 0.98)
    time_power: float = Field(
        default=3.0, ge=1, description="t = 1 - u^power; 3 is the paper's cubic schedule"
    )

    def rate_at(self, step: int) -> float:
        """Return 1, and in the last `decay_steps`, or all if they are fewer, a share that falls evenly to zero."""
        return _falling(step, self.steps, self.decay_steps)


def _falling(step: int, steps: int, decay_steps: int) -> float:
    falling = min(decay_steps, steps)
    return min(1.0, (steps - step) / falling) if falling else 1.0


class AdversarialRecipe(StageRecipe):
    """What both adversarial stages need."""

    rates: Rates
    warmup_steps: int = Field(default=0, ge=0, description="steps before the student moves")
    taps: tuple[int, ...] = Field(min_length=1, description="blocks of the frozen backbone; -1 is the input")
    combine: Literal["places", "heads", "sample"] = Field(
        default="places",
        description="what the loss sees as one logit: each place, each head's mean, or the mean of all heads",
    )
    r1_weight: float = Field(
        default=0.0, ge=0, description="of the heads' approximate R1 penalty; 0 is off, as in the paper"
    )
    r1_std: float = Field(
        default=0.01, gt=0, description="of the noise with which that penalty shakes the reals"
    )

    @property
    def average_from(self) -> int:
        """The step from which the student moves, and its average with it."""
        return self.warmup_steps


class AdpRecipe(AdversarialRecipe):
    """Adversarial distillation pre-training (arXiv 2507.18569)."""

    time_power: float = Field(
        default=3.0, ge=1, description="t = 1 - u^power; 3 is the paper's cubic schedule"
    )
    lambda_latent: float = Field(default=0.85, ge=0)
    lambda_pixel: float = Field(default=0.15, ge=0)
    pixel_backbone: Literal["none", "lite0", "sam", "dinov2"] = Field(
        default="lite0",
        description="what the pixel discriminator reads; the paper has SAM, its ablation DINOv2",
    )
    pixel_source: str | None = Field(default=None, description="folder or hub id of SAM or DINOv2")
    pixel_taps: tuple[int, ...] = ()
    pixel_size: int = Field(default=64, ge=32)
    pixel_batch: int = Field(
        default=32, ge=2, description="how many of the batch the pixel discriminator sees"
    )

    @property
    def sees_pixels(self) -> bool:
        """Tell whether there is a pixel discriminator."""
        return self.lambda_pixel > 0 and self.pixel_backbone != "none"

    @property
    def batches(self) -> dict[str, int]:
        """Rows of what is shared equally among processes, by key."""
        return super().batches | ({"pixel_batch": self.pixel_batch} if self.sees_pixels else {})

    @model_validator(mode="after")
    def _has_pixel_taps(self) -> "AdpRecipe":
        if self.sees_pixels and not self.pixel_taps:
            raise ValueError("pixel_taps: expected blocks for the heads of the pixel discriminator, got none")
        return self


class AdmRecipe(AdversarialRecipe):
    """Adversarial distribution matching (arXiv 2507.18569)."""

    delta_t: float = Field(default=1 / 64, gt=0, lt=1)
    guidance: float = Field(ge=1, description="of the real score; the fake score has none")
    time_range: tuple[float, float] = (0.02, 0.98)
    jacobian: Literal["detach", "full"] = "detach"
    time_distribution: Literal["uniform", "logit-normal"] = Field(
        default="uniform", description="of the time to which the student's samples are noised"
    )
    time_mean: float = Field(default=0.0, description="of that time's logit, where it is logit-normal")
    time_std: float = Field(default=1.0, gt=0)
    fake_updates: int = Field(default=1, ge=1, description="per step")
    update_ratio: int = Field(default=1, ge=1, description="fake and heads updates per student update")
    ida: float = Field(default=0.0, ge=0, lt=1, description=IDA)
    carry_heads: bool = Field(default=False, description="start from ADP's latent heads instead of new ones")

    @property
    def times(self) -> tuple[float, float]:
        """The lowest and the highest time to which samples are noised: a step down from there must not pass 0."""
        return max(self.time_range[0], self.delta_t), self.time_range[1]

    @model_validator(mode="after")
    def _has_times(self) -> "AdmRecipe":
        if self.delta_t >= self.time_range[1] > self.time_range[0]:
            raise ValueError(
                f"delta_t: expected below the end of time_range, {self.time_range[1]:g}, got {self.delta_t:g}"
            )
        if self.time_range[0] < 0:
            raise ValueError(f"time_range: expected it to begin at 0 or later, got {self.time_range[0]:g}")
        _check_range(self.times)
        return self


class DmdRecipe(AdversarialRecipe):
    """Distribution matching by the KL divergence (DMD, arXiv 2311.18828), with DMD2's GAN term on request."""

    guidance: float = Field(ge=1, description="of the real score; the fake score has none")
    time_range: tuple[float, float] = (0.02, 0.98)
    fake_updates: int = Field(default=5, ge=1, description="per step; 5 is DMD2's two time-scales")
    update_ratio: int = Field(default=1, ge=1, description="fake and heads updates per student update")
    ida: float = Field(default=0.0, ge=0, lt=1, description=IDA)
    gan_weight: float = Field(
        default=0.0, ge=0, description="of DMD2's GAN term; 0 leaves it out, DMD2 has 5e-3"
    )
    taps: tuple[int, ...] = Field(default=(), description="of the GAN term's heads; -1 is the input")

    @model_validator(mode="after")
    def _has_taps(self) -> "DmdRecipe":
        _check_range(self.time_range)
        if self.gan_weight > 0 and not self.taps:
            raise ValueError("taps: expected blocks for the heads of the GAN term, got none")
        return self


def _check_range(time_range: tuple[float, float]) -> None:
    low, high = time_range
    try:
        adm_times(np.zeros(0), low=low, high=high)
    except ValueError as error:
        raise ValueError(f"time_range: {error}") from None


class LaddRecipe(AdversarialRecipe):
    """Latent adversarial distillation (arXiv 2403.12015)."""

    time_mean: float = Field(default=1.0, description="of the logit of the discriminator's time")
    time_std: float = Field(default=1.0, gt=0)


class LcmRecipe(StageRecipe):
    """Latent consistency distillation (arXiv 2310.04378)."""

    rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    guidance: float = Field(ge=1, description="of the teacher's step")
    num_times: int = Field(default=50, ge=2, description="the grid on which the student is consistent")
    target_ema: float = Field(default=0.95, ge=0, lt=1, description="of the network that sets the target")
    huber: float = Field(default=1e-3, gt=0, description="where the loss turns from squared to absolute")


class VarietyRecipe(StageRecipe):
    """The variety of a prompt's variants, taught to the prompt itself."""

    variants: Path = Field(
        description="JSON: prompt -> prompts that say more, which its pictures shall be of in equal shares"
    )
    rate: float = Field(gt=0, description="of the student")
    code_rate: float = Field(gt=0, description="of what reads from the noise which variant it stands for")
    decay_steps: int = Field(
        default=0, ge=0, description="last steps, in which both rates fall evenly to zero"
    )
    betas: tuple[float, float] = (0.9, 0.98)
    guidance: float | None = Field(
        default=None, ge=1, description="that the student was trained with, where no other stage says it"
    )

    def rate_at(self, step: int) -> float:
        """Return 1, and in the last `decay_steps`, or all if they are fewer, a share that falls evenly to zero."""
        return _falling(step, self.steps, self.decay_steps)


class GuardRecipe(Strict):
    """When the health guard looks, and what it does about what it sees."""

    every: int = Field(default=100, ge=1, description="steps from look to look")
    prompts: int = Field(default=4, ge=1, description="of the probe: evenly through the training's")
    seeds: int = Field(default=4, ge=2, description="of each of the probe's prompts")
    patience: int = Field(default=2, ge=1, description="looks in a row out of band before it acts")
    reduce: float = Field(default=0.5, gt=0, lt=1, description="factor of all learning rates when it acts")
    reductions: int = Field(default=1, ge=0, description="times it lowers the rates before it goes back")
    rollbacks: int = Field(default=1, ge=0, description="times it goes back before it stops the run")
    bands: Path | None = Field(default=None, description="JSON of expected bands; the built-in ones for null")


class Roles(Strict):
    """Which networks are trained whole, and which as an adapter on the teacher's frozen weights."""

    student: Literal["full", "lora"] = "full"
    fake: Literal["full", "lora"] = "full"


class LoraRecipe(Strict):
    """The adapters of the roles that are trained so."""

    rank: int = Field(default=64, ge=1, description="DMD2 has 64")
    alpha: float = Field(default=8.0, gt=0, description="the adapter's scale is alpha / rank; DMD2 has 8")
    targets: str = Field(
        default=r"(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
        description="a regular expression of linear layers' names; all of attention by default",
    )


class MemoryRecipe(Strict):
    """What trades time for memory."""

    checkpointing: bool = Field(
        default=False, description="recompute blocks in the backward pass, the decoder's too"
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="rows of a process's share of a batch that are computed at once; gradients add up. null: all",
    )
    sharding: Literal["none", "fsdp"] = Field(
        default="none",
        description="fsdp: of networks trained whole, and of the teacher, each process of torchrun keeps a share",
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="adamw8bit keeps its moments in 8 bits: bitsandbytes, CUDA only"
    )


class EvaluateRecipe(Strict):
    """What the evaluation samples."""

    reference: Path
    num_seeds: int = Field(default=16, ge=2)
    first_seed: int = Field(default=1_000_000, ge=0)
    num_components: int = Field(default=64, ge=1, description="principal components of the Frechet distance")
    teacher_steps: int = Field(default=50, ge=1)
    teacher_guidance: float = Field(default=2.0, ge=1)


class ReportRecipe(Strict):
    """What the report draws: prompts evenly through the training's, with seeds 0, 1, ..."""

    prompts: int = Field(default=4, ge=0, description="how many; 0 draws nothing")
    seeds: int = Field(default=4, ge=2, description="of each prompt")
    teacher_steps: int = Field(default=20, ge=1, description="of the teacher's pictures")


class ExportRecipe(Strict):
    """What the bundle says of itself, and its parity gate."""

    licence: str
    attribution: str = ""
    max_batch: int = Field(default=16, ge=1)
    tolerance: float = Field(
        default=MAX_TOLERANCE, gt=0, le=MAX_TOLERANCE, description="of the parity gate: graphs beside torch"
    )
    fps: float | None = Field(default=None, gt=0, description="frames a second; of videos only")


class Recipe(Strict):
    """A whole run: teacher to verified bundle."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    version: int = Field(ge=1)
    family: Literal["emoji", "emoji-motion", "sdxl", "sd3", "cogvideox"]
    teacher: str = Field(description="a folder, or the hub id of a pipeline")
    variant: str | None = Field(default=None, description="which of a pipeline's files, like fp16")
    revision: str | None = Field(default=None, description="of the hub id")
    loras: tuple[str, ...] = Field(
        default=(), description="files of LoRA weights that belong to the teacher: base + these"
    )
    start: str | None = Field(
        default=None, description="folder of a student to go on from, like a bundle's; null: from the teacher"
    )
    shape: Shape | None = Field(
        default=None, description="what is drawn; the demo families have one size each"
    )
    prompts: Path
    seed: int = Field(ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    time_steps: tuple[float, ...] = (1.0,)
    roles: Roles = Roles()
    lora: LoraRecipe = LoraRecipe()
    memory: MemoryRecipe = MemoryRecipe()
    save_every: int | None = Field(
        default=None,
        ge=1,
        description="steps from checkpoint to checkpoint, besides those of the guard's looks; null: 100",
    )
    pairs: PairsRecipe | None = None
    regression: RegressionRecipe | None = None
    adp: AdpRecipe | None = None
    adm: AdmRecipe | None = None
    dmd: DmdRecipe | None = None
    ladd: LaddRecipe | None = None
    lcm: LcmRecipe | None = None
    variety: VarietyRecipe | None = None
    guard: GuardRecipe | None = Field(default=GuardRecipe(), description="of training's health; null: none")
    evaluate: EvaluateRecipe | None = None
    report: ReportRecipe | None = Field(default=ReportRecipe(), description="null: a report without pictures")
    export: ExportRecipe

    @model_validator(mode="after")
    def _fits(self) -> "Recipe":
        if not self.stages:
            raise ValueError(f"expected at least one training stage among {', '.join(STAGES)}, found none")
        check_times("time_steps", self.time_steps)
        needs = ["regression", "adp", "ladd", "lcm"] + ["dmd"] * (
            self.dmd is not None and self.dmd.gan_weight > 0
        )
        for stage in needs:
            if stage in self.stages and self.pairs is None:
                raise ValueError(f"{stage} learns from ODE pairs: expected a section pairs, found none")
        if (
            self.adm is not None
            and self.adm.carry_heads
            and (self.adp is None or self.adp.taps != self.adm.taps)
        ):
            raise ValueError(
                "adm.carry_heads: expected a section adp with adm's taps, whose heads to carry over"
            )
        if self.is_video and self.adp is not None and self.adp.sees_pixels:
            raise ValueError(
                f"adp.lambda_pixel: expected 0 for videos, which no image network reads, got {self.adp.lambda_pixel:g}"
            )
        if self.memory.sharding == "fsdp" and self.memory.optimizer == "adamw8bit":
            raise ValueError(
                "memory.sharding: expected optimizer adamw beside fsdp, got adamw8bit, whose moments cannot be shared"
            )
        if self.loras and self.is_demo:
            raise ValueError(f"loras: expected none for {self.family}, whose teacher is a folder of its own")
        if self.start is not None and self.roles.student == "lora":
            raise ValueError(
                "start: expected roles.student full, got lora, which begins from the teacher's weights"
            )
        if self.variety is not None and (
            self.family != "emoji" or self.roles.student == "lora" or self.time_steps != (1.0,)
        ):
            raise ValueError(
                "variety: expected family emoji, roles.student full and time_steps [1.0]: the noise of one step "
                f"chooses, and no pipeline of diffusers could read it; got {self.family}, {self.roles.student} and "
                f"{list(self.time_steps)}"
            )
        if self.roles.student != self.roles.fake and any(
            s.ida for s in (self.adm, self.dmd) if s is not None
        ):
            raise ValueError("ida: expected student and fake score of one kind, both full or both lora")
        if self.shape is None and not self.is_demo:
            raise ValueError(f"expected a shape (width, height) to distil {self.family} at, found none")
        if self.is_video != (self.export.fps is not None):
            raise ValueError(f"export.fps: expected of a video and only there, got {self.export.fps}")
        return self

    @property
    def stages(self) -> dict[str, StageRecipe]:
        """The training stages by name, in their order."""
        return {name: section for name in STAGES if (section := getattr(self, name)) is not None}

    @property
    def checkpoint_every(self) -> int:
        """Steps from checkpoint to checkpoint; the guard keeps one at each of its looks, to go back to."""
        return SAVE_EVERY if self.save_every is None else self.save_every

    @property
    def last_stage(self) -> str:
        """The stage whose student is exported."""
        return list(self.stages)[-1]

    @property
    def is_demo(self) -> bool:
        """Tell whether the teacher is one of the demo families' own folders."""
        return self.family in ("emoji", "emoji-motion")

    @property
    def is_video(self) -> bool:
        """Tell whether clips are drawn."""
        return self.family in ("emoji-motion", "cogvideox")

    @property
    def measures(self) -> EvaluateRecipe:
        """What the evaluation samples.

        Raises:
            RecipeError: the recipe has no such section.
        """
        if self.evaluate is None:
            raise RecipeError("evaluate: expected a section that says what to measure, got null")
        return self.evaluate

    @property
    def guidance(self) -> float:
        """The classifier-free guidance that the student learns."""
        for section in (self.lcm, self.dmd, self.adm, self.variety):
            if section is not None and section.guidance is not None:
                return section.guidance
        return self.pairs.guidance if self.pairs is not None else 1.0

    def sha256(self) -> str:
        """Return the hash of the resolved recipe; a part that is left out has no say in it."""
        return digest(self.model_dump(mode="json", exclude_none=True))


class RecipeError(UsageError):
    """Say in one line what of a recipe is wrong."""


def digest(value: object) -> str:
    """Return the sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply overrides of the form "adm.steps=100".

    Raises:
        RecipeError: no such file, no YAML, an unknown key, a value out of range, or a malformed override.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"{path}: expected a recipe, found no such file") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: expected YAML, got {str(error).splitlines()[0]}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected a mapping of recipe keys, got {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "value_error":  # parts that do not fit together; the message says which
            raise RecipeError(f"{path}: {where}{'.' * bool(where)}{first['ctx']['error']}") from error
        raise RecipeError(f"{path}: {where}: {first['msg']}, got {first['input']!r}") from error


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set: expected key.of.recipe=value, got {override!r}")
    *parents, last = key.split(".")
    node = raw
    for depth, part in enumerate(parents):
        if (
            depth == 0
            and part in Recipe.model_fields
            and isinstance(Recipe.model_fields[part].default, Strict)
        ):
            node.setdefault(part, {})  # a section that a recipe may leave out
        child = node.get(part)
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: the recipe has no section {part!r}")
        node = child
    node[last] = yaml.safe_load(text)
