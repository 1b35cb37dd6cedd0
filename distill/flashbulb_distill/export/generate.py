"""Pictures from prompts and seeds in torch: what a bundle must reproduce, and the teacher to compare with."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.noise import draw_noise
from ..core.sampler import sample
from ..pairs.generate import sample_teacher
from ..teachers.denoiser import Condition, Denoiser
from ..teachers.teacher import Teacher

Images = NDArray[np.uint8]
Generate = Callable[[list[str], list[int]], Images]


def to_images(pixels: Tensor) -> Images:
    """Turn pixels [n, 3, h, w] in [-1, 1] into uint8 [n, h, w, 3]."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.movedim(1, -1).contiguous().cpu().numpy()


@torch.no_grad()
def draw_images(
    denoiser: Denoiser,
    decode: Callable[[Tensor], Tensor],
    cond: Condition,
    latent_shape: Sequence[int],
    time_steps: Sequence[float],
    seeds: Sequence[int],
) -> Images:
    """Draw a few-step student's pictures, a row of `cond` each, image index 0 of each seed."""

    device = cond.tokens.device

    def noise(step: int) -> Tensor:
        drawn = np.stack([draw_noise(seed, 0, latent_shape, step) for seed in seeds])
        return torch.from_numpy(drawn).to(device)

    def denoise(xt: Tensor, t: float) -> Tensor:
        out: Tensor = denoiser(xt, torch.full((len(xt),), t, dtype=torch.float64, device=device), cond)
        return out

    latents = sample(
        denoise,
        noise(0),
        time_steps,
        prediction=denoiser.prediction,
        schedule=denoiser.schedule,
        renoise=noise,
    )
    return to_images(decode(latents))


def student_images(teacher: Teacher, student: Denoiser, time_steps: tuple[float, ...]) -> Generate:
    """Return a function (prompts, seeds) -> pictures by the few-step student, image index 0 of each seed."""

    def generate(prompts: list[str], seeds: list[int]) -> Images:
        cond = _encode_once(teacher, prompts)
        return draw_images(student, teacher.codec.decode, cond, teacher.latent_shape, time_steps, seeds)

    return generate


def teacher_images(teacher: Teacher, num_steps: int, guidance: float) -> Generate:
    """Return a function (prompts, seeds) -> pictures by the teacher's guided ODE, from the student's noise."""
    device = next(teacher.denoiser.parameters()).device
    uncond = teacher.encode_uncond().to(device)

    @torch.no_grad()
    def generate(prompts: list[str], seeds: list[int]) -> Images:
        noise = torch.from_numpy(np.stack([draw_noise(s, 0, teacher.latent_shape) for s in seeds])).to(device)
        cond = _encode_once(teacher, prompts)
        latents = sample_teacher(
            teacher.denoiser, noise, cond, uncond, num_steps=num_steps, guidance=guidance
        )
        return to_images(teacher.codec.decode(latents))

    return generate


def _encode_once(teacher: Teacher, prompts: list[str]) -> Condition:
    """Encode each distinct prompt once."""
    distinct = list(dict.fromkeys(prompts))
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
    return teacher.encode(distinct).take(rows).to(next(teacher.denoiser.parameters()).device)
