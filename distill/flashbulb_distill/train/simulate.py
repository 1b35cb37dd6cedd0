"""Sampling the student as it will be used, with a gradient through its last step alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.draws import Draws
from ..core.sampler import sample_steps
from ..teachers.denoiser import Condition, Denoiser
from .fake import Samples
from .step import device_of, sender


def simulate_student(
    student: Denoiser,
    cond: Condition,
    picks: Tensor,
    *,
    gradient: bool,
    draws: Draws,
    purpose: str,
    step: int,
    rows: range,
    latent_shape: Sequence[int],
    time_steps: Sequence[float],
) -> Samples:
    """Sample clean latents from noise up to a drawn step of the student's own; only that step carries a gradient.

    Args:
        cond: all prompts'.   picks: int64 [len(rows)], whose of them.   gradient: whether any is wanted.
        purpose: names the draws, like "adm".
    Source: backward simulation of DMD2 (Yin et al. 2024, arXiv 2405.14867), section 4.5.
    """
    device = device_of(student)
    send, picked = sender(device), cond.take(picks).to(device)
    last = int(draws.integers(f"{purpose}/stop", step, [0], len(time_steps))[0])
    noises = [send(draws.normal(f"{purpose}/start/{i}", step, rows, latent_shape)) for i in range(last + 1)]

    def denoise(xt: Tensor, t: float) -> Tensor:
        with torch.set_grad_enabled(gradient and t == time_steps[last]):
            out: Tensor = student(xt, torch.full((len(xt),), t, device=xt.device), picked)
            return out

    with torch.set_grad_enabled(gradient):
        *_, x_0 = sample_steps(
            denoise,
            noises[0],
            time_steps[: last + 1],
            prediction=student.prediction,
            schedule=student.schedule,
            renoise=noises.__getitem__,
        )
    return Samples(rows, picked, x_0)
