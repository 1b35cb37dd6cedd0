"""What the doctor looks at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..core.draws import Draws
from ..core.noise import draw_noise
from ..pairs.generate import sample_teacher
from ..teachers.denoiser import Condition, Denoiser
from ..teachers.pretrained import PretrainedTeacher
from ..teachers.teacher import Codec, Teacher
from ..train.build import Inputs
from ..train.probe import evenly
from ..train.recipe import Recipe

PROMPTS = 4
STEPS = 20  # of the teacher's samples, where the recipe makes pairs with more


class TwoWayCodec(Codec, Protocol):
    """Latents to pixels and back, as every family's codec does it."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the latents of pixels [b, 3, ...] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Subject:
    """A loaded teacher, and how a recipe means to use it.

    Args:
        new_denoiser: makes a trainable copy of the teacher that computes in bfloat16 where asked to.
        new_fake: makes the fake score as the training does: a copy, or an adapter on the teacher itself.
        bf16: whether the training does.
        cond: a few of the training prompts, one row each, distinct.   uncond: one row.
        scheduler: its configuration as diffusers writes it; None for a family without a pipeline.
        guidance: of the real score.   num_steps: with which the teacher is asked for samples.
        delta_t: the length of ADM's step.   time_steps: at which the student is asked.
    """

    denoiser: Denoiser
    codec: TwoWayCodec
    new_denoiser: Callable[[bool], Denoiser]
    new_fake: Callable[[], Denoiser]
    cond: Condition
    uncond: Condition
    latent_shape: tuple[int, ...]
    scheduler: Mapping[str, Any] | None
    guidance: float
    num_steps: int
    bf16: bool = False
    delta_t: float = 1 / 64
    time_steps: tuple[float, ...] = (1.0,)

    @property
    def device(self) -> torch.device:
        """Return the teacher's device."""
        return next(self.denoiser.parameters()).device

    def noise(self, count: int) -> Tensor:
        """Return the unit noise of seeds 0, 1, ..., [count, *latent_shape]."""
        rows = [torch.from_numpy(draw_noise(seed, 0, self.latent_shape)) for seed in range(count)]
        return torch.stack(rows).to(self.device)

    def normal(self, purpose: str, count: int) -> Tensor:
        """Return unit noise for a purpose of its own, [count, *latent_shape]."""
        drawn = Draws(0).normal(f"doctor/{purpose}", 0, range(count), self.latent_shape)
        return torch.from_numpy(drawn).to(self.device)

    @cached_property
    def samples(self) -> Tensor:
        """The teacher's clean latents of the prompts, seeds 0, 1, ...: two or more."""
        count = max(2, len(self.cond))
        return sample_teacher(
            self.denoiser,
            self.noise(count),
            self.cond.take(torch.arange(count) % len(self.cond)),
            self.uncond,
            num_steps=self.num_steps,
            guidance=self.guidance,
        )

    @cached_property
    def pixels(self) -> Tensor:
        """The samples' pixels, decoded one by one: a large VAE takes gigabytes for each."""
        with torch.no_grad():
            return torch.cat([self.codec.decode(latents[None]) for latents in self.samples])


def subject_of(recipe: Recipe, teacher: Teacher, prompts: Sequence[str]) -> Subject:
    """Return what a recipe's training would use of its teacher, with a few of its prompts."""
    device = next(teacher.denoiser.parameters()).device
    few = [prompts[place] for place in evenly(prompts, PROMPTS)]
    cond, uncond = teacher.encode(few).to(device), teacher.encode_uncond().to(device)
    steps = recipe.pairs.num_steps if recipe.pairs is not None else STEPS
    return Subject(
        denoiser=teacher.denoiser,
        codec=cast(TwoWayCodec, teacher.codec),
        new_denoiser=lambda bf16: teacher.new_denoiser(bf16=bf16),
        new_fake=Inputs(recipe, teacher, cond, uncond).fake,
        cond=cond,
        uncond=uncond,
        latent_shape=teacher.latent_shape,
        scheduler=teacher.source.scheduler() if isinstance(teacher, PretrainedTeacher) else None,
        guidance=recipe.guidance,
        num_steps=min(steps, STEPS),
        bf16=recipe.precision == "bfloat16",
        delta_t=recipe.adm.delta_t if recipe.adm is not None else 1 / 64,
        time_steps=recipe.time_steps,
    )
