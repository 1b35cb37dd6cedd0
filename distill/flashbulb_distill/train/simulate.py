"""Sampling the student as it will be used, with a gradient through its last step alone."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..core.draws import Draws
from ..core.sampler import sample_steps
from ..teachers.denoiser import Condition, Denoiser
from .fake import Samples
from .step import device_of, sender


class Simulated(Protocol):
    """A method whose student is sampled as it will be used."""

    @property
    def student(self) -> Denoiser:
        """The network in training."""
        ...

    @property
    def cond(self) -> Condition:
        """All prompts."""
        ...

    @property
    def draws(self) -> Draws:
        """The run's random numbers."""
        ...

    @property
    def latent_shape(self) -> Sequence[int]:
        """Of one picture's or clip's latents."""
        ...

    @property
    def time_steps(self) -> Sequence[float]:
        """The student's own times."""
        ...


def simulate_student(
    method: Simulated, purpose: str, picks: Tensor, step: int, rows: range, *, gradient: bool
) -> Samples:
    """Sample clean latents from noise up to a drawn step of the student's own; only that step carries a gradient.

    Args:
        purpose: names the draws, like "adm".   picks: int64 [len(rows)], whose prompts.
        gradient: whether any is wanted.
    Source: backward simulation of DMD2 (Yin et al. 2024, arXiv 2405.14867), section 4.5.
    """
    student, draws, time_steps = method.student, method.draws, method.time_steps
    device = device_of(student)
    send, picked = sender(device), method.cond.take(picks).to(device)
    last = int(draws.integers(f"{purpose}/stop", step, [0], len(time_steps))[0])
    noises = [
        send(draws.normal(f"{purpose}/start/{i}", step, rows, method.latent_shape)) for i in range(last + 1)
    ]

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
