"""Pieces that the methods' steps share."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ..losses import approximate_r1
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, join

TIME_BINS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.01))


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a network's parameters."""
    return next(module.parameters()).device


def sender(device: torch.device) -> Callable[[NDArray[np.generic]], Tensor]:
    """Return a function that makes drawn numbers a tensor on the device: draws are the same on every device."""
    return lambda drawn: torch.from_numpy(drawn).to(device)


def update(loss: Tensor, optimizers: Sequence[Optimizer], clip: float, ranks: Ranks = ALONE) -> float:
    """Move the optimisers' parameters down the gradient of `loss`, and nothing else; return the gradient's norm."""
    return update_by_parts([(1.0, loss)], optimizers, clip, ranks)


def update_by_parts(
    parts: Iterable[tuple[float, Tensor]], optimizers: Sequence[Optimizer], clip: float, ranks: Ranks = ALONE
) -> float:
    """Move the optimisers' parameters down the gradient of a sum of losses; return the gradient's norm.

    Gradients are taken of those parameters only, so that a network which the loss merely passes through keeps none.
    With several ranks it is the gradient of the mean of their losses.

    Args:
        parts: (share, loss), made one after another: each one's graph is gone before the next is built.
    """
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    gradients: list[Tensor | None] = [None] * len(parameters)
    for share, loss in parts:
        found = torch.autograd.grad(loss if share == 1 else share * loss, parameters, allow_unused=True)
        for place, gradient in enumerate(found):
            before = gradients[place]
            if gradient is not None:
                gradients[place] = gradient if before is None else before + gradient
    ranks.average(gradients)
    for parameter, total in zip(parameters, gradients, strict=True):
        parameter.grad = total
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(norm)


def judge(latent: nn.Module, real: Tensor, fake: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
    """Return the logits [b, n] of real and of fake latents [b, ...] at times [b], computed as one batch.

    So the arithmetic's own noise is common to both sides, and nothing for a discriminator to see.
    """
    real_logits, fake_logits = latent(torch.cat([real, fake]), torch.cat([t, t]), join(cond, cond)).chunk(2)
    return real_logits, fake_logits


def shaken(
    latent: nn.Module, real: Tensor, logits: Tensor, t: Tensor, cond: Condition, noise: Tensor
) -> Tensor:
    """Return the approximate R1 penalty of real latents [b, ...] whose logits are known, under the given noise."""
    return approximate_r1(logits, latent(real + noise, t, cond))


def ordered(real: Tensor, fake: Tensor) -> float:
    """Return the share of rows [b, n] whose mean real logit lies above their fake one (.5: blind).

    Where both sides are steps of length dt from one point, as in ADM, the two distributions overlap all but for a share
    of the order of dt, so that no discriminator can give them two signs; a seeing one still gives them this order.
    """
    return (real.mean(1) > fake.mean(1)).float().mean().item()


def accuracy_by_time(real: Tensor, fake: Tensor, t: Tensor) -> dict[str, float]:
    """Return, in thirds of the time axis, how often a sample's mean logit is right, and how often hinge is satisfied.

    accuracy_t*: the right sign (.5: blind).   saturation_t*: beyond the hinge's margin, where the loss teaches nothing.

    Args:
        real, fake: [b, places] logits.   t: [b] times of both.
    """
    real, fake = real.mean(1), fake.mean(1)
    right = ((real > 0).float() + (fake < 0).float()) / 2
    beyond = ((real >= 1).float() + (fake <= -1).float()) / 2
    result = {}
    for low, high in TIME_BINS:
        inside = (t >= low) & (t < high)
        if inside.any():
            result[f"accuracy_t{low:.2f}"] = right[inside].mean().item()
            result[f"saturation_t{low:.2f}"] = beyond[inside].mean().item()
    return result
