"""Integrate the teacher's guided ODE from seeded noise: the pairs (x_T, x_0) that ADP learns from."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..core.draws import Draws
from ..core.sampler import sample_ode
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser, guided_x0
from .store import add_to_index, start_store, write_shard


@torch.no_grad()
def sample_teacher(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Condition,
    uncond: Condition,
    *,
    num_steps: int,
    guidance: float,
    order: Literal[1, 2] = 1,
) -> Tensor:
    """Sample clean latents from unit noise [b, ...] by the teacher's guided probability-flow ODE."""

    def denoise(xt: Tensor, t: float) -> Tensor:
        return guided_x0(denoiser, xt, torch.full((len(xt),), t, device=xt.device), cond, uncond, guidance)

    x_0: Tensor = sample_ode(
        denoise,
        noise,
        num_steps,
        prediction="x0",
        schedule=denoiser.schedule,
        shift=denoiser.shift,
        order=order,
    )
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
    order: Literal[1, 2] = 1,
    draws: Draws,
    batch_size: int = 64,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill a store with `count` pairs, going on where it ends; pair i depends on (seed, i) alone.

    Several ranks make a batch each at a time; the store is the same, byte for byte, however many there are.

    Args:
        cond: the prompts' embeddings, one row each.   uncond: one row, the empty prompt's.
        progress: called with (pairs done, pairs wanted).
    """
    device = next(denoiser.parameters(), torch.empty(0)).device
    done, num_shards = ranks.first(lambda: start_store(folder, prompts))
    while done < count:
        starts = range(done, count, batch_size)[: ranks.count]
        start = starts[
            ranks.index % len(starts)
        ]  # of none left too: ranks that share a network call it together
        samples = range(start, min(start + batch_size, count))
        prompt = torch.from_numpy(draws.integers("pairs/prompt", 0, samples, len(prompts)))
        x_T = torch.from_numpy(draws.normal("pairs/noise", 0, samples, latent_shape)).to(device)
        x_0 = sample_teacher(
            denoiser,
            x_T,
            cond.take(prompt).to(device),
            uncond,
            num_steps=num_steps,
            guidance=guidance,
            order=order,
        )
        entry = None
        if ranks.index < len(starts):
            entry = write_shard(folder, num_shards + ranks.index, x_T, x_0, prompt)
        entries = [made for made in ranks.gather(entry) if made is not None]
        if ranks.is_first:
            add_to_index(folder, entries)
        num_shards += len(entries)
        done += sum(made["count"] for made in entries)
        if ranks.is_first:
            progress(done, count)
