"""Put a method together for the demo family: its networks, their starting weights and optimisers."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..core.draws import Draws
from ..networks.discriminators import LatentDiscriminator, PixelDiscriminator
from ..networks.lite0 import BLOCK_CHANNELS, load_lite0
from ..pairs.store import Pairs
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition
from ..teachers.emoji import EmojiDenoiser, EmojiTeacher
from .adm import Adm
from .adp import Adp
from .recipe import Rates, Recipe, RegressionRecipe
from .regression import Regression
from .step import device_of


def build_regression(
    recipe: Recipe,
    stage: RegressionRecipe,
    teacher: EmojiTeacher,
    pairs: Pairs,
    cond: Condition,
    ranks: Ranks = ALONE,
) -> Regression:
    """Build the regression on the pairs: the student starts as the teacher."""
    student = teacher.new_denoiser(bf16=recipe.precision == "bfloat16")
    optimizer = AdamW(student.parameters(), lr=stage.rate, betas=stage.betas, weight_decay=0.0)
    return Regression(stage, Draws(recipe.seed), pairs, cond, student, {"student": optimizer}, ranks)


def build_adp(
    recipe: Recipe,
    teacher: EmojiTeacher,
    pairs: Pairs,
    cond: Condition,
    start: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> Adp:
    """Build ADP: the student starts from `start` (the regression's average), else as the teacher; heads at random."""
    stage = recipe.adp
    torch.manual_seed(recipe.seed)
    student = teacher.new_denoiser(bf16=recipe.precision == "bfloat16")
    if start is not None:
        load_parameters(student, start)
    latent = _latent_discriminator(teacher, stage.taps)
    pixel = None
    if stage.lambda_pixel > 0:
        channels = [BLOCK_CHANNELS[tap] for tap in stage.pixel_taps]
        backbone = load_lite0().to(device_of(student))
        pixel = PixelDiscriminator(backbone, stage.pixel_taps, channels, size=stage.pixel_size)
        pixel.to(device_of(student))
    trained: dict[str, nn.Module] = {"student": student, "latent": latent}
    trained |= {"pixel": pixel} if pixel is not None else {}
    return Adp(
        recipe=stage,
        draws=Draws(recipe.seed),
        pairs=pairs,
        cond=cond,
        student=student,
        latent=latent,
        pixel=pixel,
        decode=teacher.codec.decode,
        optimizers=_optimizers(trained, stage.rates),
        ranks=ranks,
    )


def build_adm(
    recipe: Recipe,
    teacher: EmojiTeacher,
    cond: Condition,
    uncond: Condition,
    start: Mapping[str, Tensor],
    ranks: Ranks = ALONE,
) -> Adm:
    """Build ADM: the student starts from `start` (ADP's average), the fake score as the teacher, heads at random."""
    stage = recipe.adm
    torch.manual_seed(recipe.seed + 1)
    bf16 = recipe.precision == "bfloat16"
    student = teacher.new_denoiser(bf16=bf16)
    load_parameters(student, start)
    fake = teacher.new_denoiser(bf16=bf16)
    latent = _latent_discriminator(teacher, stage.taps)
    return Adm(
        recipe=stage,
        draws=Draws(recipe.seed),
        cond=cond,
        uncond=uncond,
        latent_shape=teacher.latent_shape,
        time_steps=recipe.time_steps,
        teacher=teacher.denoiser,
        student=student,
        fake=fake,
        latent=latent,
        optimizers=_optimizers({"student": student, "fake": fake, "latent": latent}, stage.rates),
        ranks=ranks,
    )


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


def student_of(teacher: EmojiTeacher, values: Mapping[str, Tensor]) -> EmojiDenoiser:
    """Return a frozen float32 student with the given parameters."""
    student = teacher.new_denoiser(bf16=False)
    load_parameters(student, values)
    return student.requires_grad_(False).eval()


def _latent_discriminator(teacher: EmojiTeacher, taps: tuple[int, ...]) -> LatentDiscriminator:
    channels, denoiser = teacher.latent_shape[0], teacher.denoiser
    heads = LatentDiscriminator(denoiser, taps, channels=channels, width=denoiser.width)
    return heads.to(device_of(denoiser))


def _optimizers(modules: Mapping[str, nn.Module], rates: Rates) -> dict[str, Optimizer]:
    own = {"student": rates.student, "fake": rates.fake}
    return {
        role: AdamW(module.parameters(), lr=own.get(role, rates.heads), betas=rates.betas, weight_decay=0.0)
        for role, module in modules.items()
    }
