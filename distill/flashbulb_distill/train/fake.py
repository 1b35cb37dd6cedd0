"""The fake score: a network that is kept at denoising whatever the student makes just now."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import add_noise, alpha_sigma
from ..losses import velocity_loss
from ..ranks import Ranks
from ..teachers.denoiser import Condition, Denoiser, spread
from .step import sender, update


def update_fake(
    fake: Denoiser,
    optimizer: Optimizer,
    x_0: Tensor,
    cond: Condition,
    *,
    draws: Draws,
    purpose: str,
    step: int,
    rows: range,
    updates: int,
    clip: float,
    ranks: Ranks,
) -> dict[str, float]:
    """Train the fake score on the student's samples by the teacher's own denoising loss; return means to log.

    Args:
        x_0: [b, ...] samples, detached.   purpose: names the draws, like "adm".
    """
    losses, norms, send = [], [], sender(x_0.device)
    for index in range(updates):
        name = f"{purpose}/fake/{index}"
        t = send(draws.uniform(f"{name}/time", step, rows)).float().clamp(min=1e-3)
        eps = send(draws.normal(f"{name}/noise", step, rows, x_0.shape[1:]))
        xt = add_noise(fake.schedule, x_0, eps, spread(t, x_0))
        sigma = alpha_sigma(fake.schedule, t)[1]
        loss = velocity_loss(fake.x0(xt, t, cond), x_0, sigma)
        norms.append(update(loss, [optimizer], clip, ranks))
        losses.append(loss.item())
    return {"fake_loss": sum(losses) / updates, "fake_norm": sum(norms) / updates}


@torch.no_grad()
def pull(fake: Denoiser, student: Denoiser, share: float) -> None:
    """Move the fake score's weights towards the student's: fake <- (1 - share) fake + share student.

    Both are networks of one architecture, so the student's weights are a first guess at its own score.

    Source: implicit distribution alignment (Ge et al. 2025, SenseFlow, arXiv 2506.00523); share .03 there.
    """
    for theirs, own in zip(student.parameters(), fake.parameters(), strict=True):
        own.lerp_(theirs.to(own.dtype), share)
