"""Put a stage's method together: its networks, their starting weights and optimisers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..core.draws import Draws
from ..networks.discriminators import LatentDiscriminator, PixelDiscriminator
from ..networks.lora import Adapted, SharedBackbone, checkpoint_blocks, merge, share_down, targeted
from ..networks.vision import load_pixel_backbone
from ..pairs.store import DrawnPairs
from ..ranks import ALONE, Ranks
from ..sharding import is_shared, shard
from ..teachers.codec import VaeCodec
from ..teachers.denoiser import Condition, Denoiser
from ..teachers.emoji import EmojiDenoiser, is_code
from ..teachers.noise_code import NoiseCode
from ..teachers.teacher import Teacher
from .adm import Adm
from .adp import Adp
from .dmd import Dmd
from .guard import load_bands
from .ladd import Ladd
from .lcm import Lcm
from .recipe import WITH_FAKE, AdpRecipe, AdversarialRecipe, Rates, Recipe, RecipeError
from .regression import Regression
from .step import device_of
from .trainer import Method
from .variety import Variants, Variety


@dataclass(frozen=True)
class Inputs:
    """What a stage's method is made from."""

    recipe: Recipe
    teacher: Teacher
    cond: Condition  # one row for each training prompt, or for each of the pairs' prompts
    uncond: Condition  # the row for no prompt, on the teacher's device
    pairs: DrawnPairs | None = None
    start: Mapping[str, Tensor] | None = None  # the student of the stage before; None: the teacher
    heads: Mapping[str, Tensor] | None = None  # ADP's latent heads, where ADM takes them over
    variants: Variants | None = None  # what each training prompt may stand for
    ranks: Ranks = ALONE
    draws: Callable[[int], Draws] = Draws  # from the recipe's seed

    @property
    def micro_batch(self) -> int | None:
        """How many rows of a batch are computed at once; None is all."""
        return self.recipe.memory.micro_batch

    def required_pairs(self) -> DrawnPairs:
        """Return the pairs.

        Raises:
            ValueError: there are none.
        """
        if self.pairs is None:
            raise ValueError("expected ODE pairs, got none; the recipe needs a section pairs")
        return self.pairs

    def student(self, name: str = "student") -> Denoiser:
        """Return a network to train that starts where the stage before ended, else as the teacher."""
        student = self._network(name, self.recipe.roles.student)
        if self.start is not None:
            load_student(student, self.start)
        return self._shared_out(student)

    def fake(self, student: Denoiser | None = None) -> Denoiser:
        """Return a network to train that starts as the teacher.

        Args:
            student: that it may be pulled along by; if both are adapters, they begin with one A.
        """
        fake = self._network("fake", self.recipe.roles.fake)
        if isinstance(fake, Adapted) and isinstance(student, Adapted):
            share_down(student, fake)
        return self._shared_out(fake)

    def _shared_out(self, network: Denoiser) -> Denoiser:
        """Return the network, its blocks shared out over the ranks where the recipe says so; adapters stay whole."""
        if (
            self.recipe.memory.sharding == "fsdp"
            and self.ranks.count > 1
            and not isinstance(network, Adapted)
        ):
            shard(network.network, network.blocks)
        return network

    def share_out_teacher(self) -> None:
        """Share out the teacher's blocks too, when all that is made from it is there."""
        self._shared_out(self.teacher.denoiser)

    def _network(self, name: str, kind: str) -> Denoiser:
        recipe = self.recipe
        if kind == "full":
            network = self.teacher.new_denoiser(bf16=recipe.precision == "bfloat16")
            if recipe.memory.checkpointing:
                checkpoint_blocks(network)
            return network
        return self._shared.adapter(name, rank=recipe.lora.rank, alpha=recipe.lora.alpha)

    @cached_property
    def _shared(self) -> SharedBackbone:
        """The teacher's weights with adapters; switched off they are the teacher."""
        shared = SharedBackbone(self.teacher.denoiser, targets=self.recipe.lora.targets)
        if self.recipe.memory.checkpointing:
            checkpoint_blocks(shared.backbone, shared.switch)
        return shared

    def optimizer(
        self, parameters: Iterable[nn.Parameter], rate: float, betas: tuple[float, float]
    ) -> Optimizer:
        """Return the recipe's optimiser, with what is shared out and what is not in groups of their own.

        Raises:
            RecipeError: it is not installed.
        """
        every = list(parameters)
        groups = [
            {"params": group}
            for group in ([p for p in every if is_shared(p)], [p for p in every if not is_shared(p)])
            if group
        ]
        if self.recipe.memory.optimizer == "adamw":
            return AdamW(groups, lr=rate, betas=betas, weight_decay=0.0)
        return _adamw8bit()(groups, lr=rate, betas=betas, weight_decay=0.0)

    def optimizers(self, modules: Mapping[str, nn.Module], rates: Rates) -> dict[str, Optimizer]:
        """Return an optimiser for each role at its own rate."""
        own = {"student": rates.student, "fake": rates.fake}
        return {
            role: self.optimizer(module.parameters(), own.get(role, rates.heads), rates.betas)
            for role, module in modules.items()
        }


def _adamw8bit() -> Callable[..., Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise RecipeError(
            "memory.optimizer: expected bitsandbytes for adamw8bit, it is not installed; "
            "run: pip install bitsandbytes, or say adamw"
        ) from error
    kind: Callable[..., Optimizer] = AdamW8bit
    return kind


def check_stages(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse what no stage could be trained with anywhere: hours of work come before the later ones.

    Raises:
        UsageError: the teacher has no such block, there is no layer to adapt, or the guard has no such bands.
    """
    _ = teacher.denoiser, teacher.latent_shape  # whose errors name keys of their own
    roles = {recipe.roles.student} | {recipe.roles.fake for name in recipe.stages if name in WITH_FAKE}
    if "lora" in roles:
        targeted(teacher.denoiser, recipe.lora.targets)
    for name, stage in recipe.stages.items():
        if recipe.guard is not None:
            load_bands(recipe.guard.bands, name)
        try:
            if isinstance(stage, AdversarialRecipe) and stage.taps:
                _latent_discriminator(teacher, stage)
        except ValueError as error:
            raise RecipeError(f"{name}.{error}") from error


def check_here(recipe: Recipe, teacher: Teacher, ranks: Ranks, stages: Iterable[str]) -> None:
    """Refuse stages that these processes could not train, which others perhaps could.

    Raises:
        RecipeError: the ranks cannot share a batch, there is no such backbone, or the optimiser is not installed.
    """
    if recipe.memory.optimizer == "adamw8bit":
        _adamw8bit()
    _ = teacher.denoiser  # whose errors name keys of their own
    for name in stages:
        stage = recipe.stages[name]
        try:
            for key, rows in stage.batches.items():
                _check_shared(key, rows, ranks)
            if isinstance(stage, AdpRecipe):
                _pixel_discriminator(teacher, stage)
        except (ValueError, FileNotFoundError) as error:
            raise RecipeError(f"{name}.{error}") from error


def _check_shared(key: str, rows: int, ranks: Ranks) -> None:
    try:
        ranks.rows(rows)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def build(stage: str, inputs: Inputs) -> Method:
    """Build the method of a recipe's stage."""
    method = _BUILDERS[stage](inputs)
    inputs.share_out_teacher()
    return method


def build_regression(inputs: Inputs) -> Regression:
    """Build the regression on the pairs."""
    stage = inputs.recipe.regression
    assert stage is not None
    torch.manual_seed(inputs.recipe.seed)
    student = inputs.student()
    optimizer = inputs.optimizer(student.parameters(), stage.rate, stage.betas)
    return Regression(
        stage,
        inputs.draws(inputs.recipe.seed),
        inputs.required_pairs(),
        inputs.cond,
        student,
        {"student": optimizer},
        inputs.ranks,
        inputs.micro_batch,
    )


def build_adp(inputs: Inputs) -> Adp:
    """Build ADP: heads start at random."""
    recipe, stage = inputs.recipe, inputs.recipe.adp
    assert stage is not None
    torch.manual_seed(recipe.seed)
    student = inputs.student()
    latent = _latent_discriminator(inputs.teacher, stage)
    pixel = _pixel_discriminator(inputs.teacher, stage)
    trained: dict[str, nn.Module] = {"student": student, "latent": latent}
    trained |= {"pixel": pixel} if pixel is not None else {}
    return Adp(
        recipe=stage,
        draws=inputs.draws(recipe.seed),
        pairs=inputs.required_pairs(),
        cond=inputs.cond,
        student=student,
        latent=latent,
        pixel=pixel,
        decode=_decoder(inputs),
        optimizers=inputs.optimizers(trained, stage.rates),
        ranks=inputs.ranks,
        micro_batch=inputs.micro_batch,
    )


def build_adm(inputs: Inputs) -> Adm:
    """Build ADM: the fake score starts as the teacher, heads at random or where ADP left them."""
    recipe, stage, teacher = inputs.recipe, inputs.recipe.adm, inputs.teacher
    assert stage is not None
    torch.manual_seed(recipe.seed + 1)
    student = inputs.student()
    fake = inputs.fake(student)
    latent = _latent_discriminator(teacher, stage)
    if inputs.heads is not None:
        load_parameters(latent, inputs.heads)
    return Adm(
        recipe=stage,
        draws=inputs.draws(recipe.seed),
        cond=inputs.cond,
        uncond=inputs.uncond,
        latent_shape=teacher.latent_shape,
        time_steps=recipe.time_steps,
        teacher=teacher.denoiser,
        student=student,
        fake=fake,
        latent=latent,
        optimizers=inputs.optimizers({"student": student, "fake": fake, "latent": latent}, stage.rates),
        ranks=inputs.ranks,
        micro_batch=inputs.micro_batch,
    )


def build_dmd(inputs: Inputs) -> Dmd:
    """Build DMD: the fake score starts as the teacher; heads, at random, only with the GAN term."""
    recipe, stage, teacher = inputs.recipe, inputs.recipe.dmd, inputs.teacher
    assert stage is not None
    torch.manual_seed(recipe.seed + 1)
    student = inputs.student()
    fake = inputs.fake(student)
    latent = _latent_discriminator(teacher, stage) if stage.gan_weight > 0 else None
    trained: dict[str, nn.Module] = {"student": student, "fake": fake}
    trained |= {"latent": latent} if latent is not None else {}
    return Dmd(
        recipe=stage,
        draws=inputs.draws(recipe.seed),
        cond=inputs.cond,
        uncond=inputs.uncond,
        latent_shape=teacher.latent_shape,
        time_steps=recipe.time_steps,
        teacher=teacher.denoiser,
        student=student,
        fake=fake,
        optimizers=inputs.optimizers(trained, stage.rates),
        latent=latent,
        pairs=inputs.required_pairs() if latent is not None else None,
        ranks=inputs.ranks,
        micro_batch=inputs.micro_batch,
    )


def build_ladd(inputs: Inputs) -> Ladd:
    """Build LADD: heads start at random."""
    recipe, stage = inputs.recipe, inputs.recipe.ladd
    assert stage is not None
    torch.manual_seed(recipe.seed + 1)
    student = inputs.student()
    latent = _latent_discriminator(inputs.teacher, stage)
    return Ladd(
        recipe=stage,
        draws=inputs.draws(recipe.seed),
        pairs=inputs.required_pairs(),
        cond=inputs.cond,
        time_steps=recipe.time_steps,
        student=student,
        latent=latent,
        optimizers=inputs.optimizers({"student": student, "latent": latent}, stage.rates),
        ranks=inputs.ranks,
        micro_batch=inputs.micro_batch,
    )


def build_lcm(inputs: Inputs) -> Lcm:
    """Build LCM: the network that sets the target starts as the student."""
    recipe, stage = inputs.recipe, inputs.recipe.lcm
    assert stage is not None
    torch.manual_seed(recipe.seed)
    student, target = inputs.student(), inputs.student("target")
    if isinstance(student, Adapted) and isinstance(target, Adapted):
        share_down(student, target)
    optimizer = inputs.optimizer(student.parameters(), stage.rate, stage.betas)
    return Lcm(
        recipe=stage,
        draws=inputs.draws(recipe.seed),
        pairs=inputs.required_pairs(),
        cond=inputs.cond,
        uncond=inputs.uncond,
        teacher=inputs.teacher.denoiser,
        student=student,
        target=target.requires_grad_(False),
        optimizers={"student": optimizer},
        ranks=inputs.ranks,
        micro_batch=inputs.micro_batch,
    )


def build_variety(inputs: Inputs) -> Variety:
    """Build the stage of the prompts' variants: the student gets a code of its noise, at first of no effect."""
    recipe, stage = inputs.recipe, inputs.recipe.variety
    assert stage is not None and inputs.variants is not None
    torch.manual_seed(recipe.seed)
    before, student = inputs.student("before"), inputs.student()
    code = with_code(student)
    network = [parameter for name, parameter in student.named_parameters() if not is_code(name)]
    optimizer = inputs.optimizer(network, stage.rate, stage.betas)
    optimizer.add_param_group({"params": list(code.parameters()), "lr": stage.code_rate})
    return Variety(
        recipe=stage,
        draws=inputs.draws(recipe.seed),
        cond=inputs.cond,
        variants=inputs.variants,
        latent_shape=inputs.teacher.latent_shape,
        before=before.requires_grad_(False),
        student=student,
        optimizers={"student": optimizer},
        ranks=inputs.ranks,
        micro_batch=inputs.micro_batch,
    )


_BUILDERS: dict[str, Callable[[Inputs], Method]] = {
    "regression": build_regression,
    "adp": build_adp,
    "adm": build_adm,
    "dmd": build_dmd,
    "ladd": build_ladd,
    "lcm": build_lcm,
    "variety": build_variety,
}


def load_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set a module's parameters, all of them, by name."""
    own = dict(module.named_parameters())
    if own.keys() != values.keys():
        raise ValueError(
            f"expected {len(own)} parameters, got {len(values)}; the weights are of another network"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])


def student_of(teacher: Teacher, values: Mapping[str, Tensor], recipe: Recipe) -> Denoiser:
    """Return a frozen float32 student with the given parameters; an adapter's are merged into the teacher's."""
    student = teacher.new_denoiser(bf16=False)
    if recipe.roles.student == "lora":
        merge(student, values, rank=recipe.lora.rank, alpha=recipe.lora.alpha)
    else:
        load_student(student, values)
    return student.requires_grad_(False).eval()


def load_student(student: Denoiser, values: Mapping[str, Tensor]) -> None:
    """Set a student's parameters, all of them, by name; it gets a code of its noise where they have one."""
    if any(is_code(name) for name in values):
        with_code(student)
    load_parameters(student, values)


def with_code(student: Denoiser) -> NoiseCode:
    """Return the code of a student of the emoji family, which gets a new one where it has none."""
    assert isinstance(student, EmojiDenoiser)
    if student.code is None:
        width = student.transformer.config["pooled_projection_dim"]
        student.code = NoiseCode(width).to(device_of(student))
    return student.code


def _latent_discriminator(teacher: Teacher, stage: AdversarialRecipe) -> LatentDiscriminator:
    channels, *axes = teacher.latent_shape
    heads = LatentDiscriminator(
        teacher.denoiser, stage.taps, channels=channels, axes=len(axes), combine=stage.combine
    )
    return heads.to(device_of(teacher.denoiser))


def _decoder(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """Return the teacher's decoder; its blocks are recomputed as the networks' are: no activations are larger."""
    codec = inputs.teacher.codec
    if inputs.recipe.memory.checkpointing and isinstance(codec, VaeCodec):
        codec.vae.enable_gradient_checkpointing()
    return codec.decode


def _pixel_discriminator(teacher: Teacher, stage: AdpRecipe) -> PixelDiscriminator | None:
    if not stage.sees_pixels:
        return None
    assert stage.pixel_backbone != "none"
    size, taps = stage.pixel_size, stage.pixel_taps
    backbone = load_pixel_backbone(stage.pixel_backbone, stage.pixel_source, size=size, taps=taps)
    device = device_of(teacher.denoiser)
    return PixelDiscriminator(backbone.to(device), taps, size=size, combine=stage.combine).to(device)
