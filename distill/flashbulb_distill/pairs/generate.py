"""Integrate the teacher's guided ODE from seeded noise: the pairs (x_T, x_0) that ADP learns from."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..core.draws import Draws
from ..core.sampler import sample_ode
from ..teachers.denoiser import Condition, Denoiser, guided_x0
from .store import append_shard, start_store


@torch.no_grad()
def sample_teacher(
    denoiser: Denoiser, noise: Tensor, cond: Condition, uncond: Condition, *, num_steps: int, guidance: float
) -> Tensor:
    """Sample clean latents from unit noise [b, ...] by the teacher's guided probability-flow ODE."""

    def denoise(xt: Tensor, t: float) -> Tensor:
        return guided_x0(denoiser, xt, torch.full((len(xt),), t), cond, uncond, guidance)

    x_0: Tensor = sample_ode(denoise, noise, num_steps, prediction="x0", schedule=denoiser.schedule)
    return x_0


def generate_pairs(
    folder: Path,
    denoiser: Denoiser,
    prompts: tuple[str, ...],
    cond: Condition,
    uncond: Condition,
    *,
    latent_shape: tuple[int, ...],
    count: int,
    num_steps: int,
    guidance: float,
    draws: Draws,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill a store with `count` pairs, going on where it ends; pair i depends on (seed, i) alone.

    Args:
        cond: the prompts' embeddings, one row each.   uncond: one row, the empty prompt's.
        progress: called with (pairs done, pairs wanted).
    """
    done = start_store(folder, prompts)
    while done < count:
        samples = range(done, min(done + batch_size, count))
        prompt = torch.from_numpy(draws.integers("pairs/prompt", 0, samples, len(prompts)))
        x_T = torch.from_numpy(draws.normal("pairs/noise", 0, samples, latent_shape))
        x_0 = sample_teacher(denoiser, x_T, cond.take(prompt), uncond, num_steps=num_steps, guidance=guidance)
        append_shard(folder, x_T, x_0, prompt)
        done += len(samples)
        progress(done, count)
