"""The fake score: a network that is kept at denoising whatever the student makes just now."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import add_noise, alpha_sigma
from ..losses import denoising_loss
from ..ranks import Ranks
from ..sharding import own
from ..teachers.denoiser import Condition, Denoiser, spread
from ..teachers.emoji import is_code
from .step import Means, sender, update


@dataclass(frozen=True, slots=True)
class Samples:
    """Some rows of a batch: the student's samples x_0 [b, ...] with the conditions that they were made for."""

    rows: range
    cond: Condition
    x_0: Tensor


def update_fake(
    fake: Denoiser,
    optimizer: Optimizer,
    parts: Sequence[Samples],
    *,
    draws: Draws,
    purpose: str,
    step: int,
    updates: int,
    clip: float,
    ranks: Ranks,
) -> dict[str, float]:
    """Train the fake score on the student's samples by the teacher's own denoising loss; return means to log.

    Args:
        parts: of the batch, computed one after another.   purpose: names the draws, like "adm".
    """
    logs, count = Means(), sum(len(part.rows) for part in parts)

    def losses(name: str) -> Iterator[Tensor]:
        for part in parts:
            x_0, send = part.x_0.detach(), sender(part.x_0.device)
            t = send(draws.uniform(f"{name}/time", step, part.rows)).float().clamp(min=1e-3)
            eps = send(draws.normal(f"{name}/noise", step, part.rows, x_0.shape[1:]))
            xt = add_noise(fake.schedule, x_0, eps, spread(t, x_0))
            estimate, share = fake.x0(xt, t, part.cond), len(part.rows) / count
            loss = denoising_loss(fake.prediction, estimate, x_0, *alpha_sigma(fake.schedule, t))
            logs.add(share / updates, fake_loss=loss)
            yield share * loss

    norms = [update(losses(f"{purpose}/fake/{i}"), [optimizer], clip, ranks) for i in range(updates)]
    return {**logs, "fake_norm": sum(norms) / updates}


@torch.no_grad()
def pull(fake: Denoiser, student: Denoiser, share: float) -> None:
    """Move the fake score's weights towards the student's: fake <- (1 - share) fake + share student.

    Both are networks of one architecture, so the student's weights are a first guess at its own score. Of adapters the
    factors are moved: they begin with one A, and the pull itself keeps both near, so that the weights move by as much.

    Source: implicit distribution alignment (Ge et al. 2025, SenseFlow, arXiv 2506.00523); share .03 there.
    """
    # The student may have got a code; a fake score has one only where its teacher has.
    is_coded = any(is_code(name) for name, _ in fake.named_parameters())
    of_both = (weights for name, weights in student.named_parameters() if is_coded or not is_code(name))
    for theirs, ours in zip(of_both, fake.parameters(), strict=True):
        own(ours).lerp_(own(theirs).to(ours.dtype), share)
