"""Pieces that the methods' steps share."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ..losses import approximate_r1
from ..ranks import ALONE, Ranks
from ..sharding import is_shared, leaf, own
from ..teachers.denoiser import Condition, join

TIME_BINS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.01))


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a network's parameters."""
    return next(module.parameters()).device


def sender(device: torch.device) -> Callable[[NDArray[np.generic]], Tensor]:
    """Return a function that makes drawn numbers a tensor on the device: draws are the same on every device."""
    return lambda drawn: torch.from_numpy(drawn).to(device)


class Parts:
    """A batch that is computed in parts, one after another: shares of its loss, and means of what they log."""

    def __init__(self, rows: range, size: int | None) -> None:
        """Cut `rows` into parts of at most `size` rows; None leaves them together."""
        size = size or len(rows)
        self.rows = rows
        self.parts = [rows[start : start + size] for start in range(0, len(rows), size)]

    def __iter__(self) -> Iterator[range]:
        return iter(self.parts)

    @property
    def is_whole(self) -> bool:
        """Tell whether there is one part: then what was computed for an update may keep its graph until the next."""
        return len(self.parts) == 1

    def share(self, part: range) -> float:
        """Return a part's share of the batch's mean."""
        return len(part) / len(self.rows)

    def within(self, part: range, few: int) -> int:
        """Return how many of a part's rows are among the batch's first `few`."""
        return max(0, min(few - self.rows.index(part[0]), len(part)))


class Means(dict[str, float]):
    """Means over a batch, by name, of values that its parts give one after another."""

    def add(self, share: float, **values: Tensor) -> None:
        """Add one part's means, which count by their share."""
        for name, value in values.items():
            self[name] = self.get(name, 0.0) + share * value.item()


def update(
    losses: Iterable[Tensor], optimizers: Sequence[Optimizer], clip: float, ranks: Ranks = ALONE
) -> float:
    """Move the optimisers' parameters down the gradient of a sum of losses; return the gradient's norm.

    Gradients are taken of those parameters only, so that a network which the loss merely passes through keeps none.
    With several ranks it is the gradient of the mean of their sums.

    Args:
        losses: of a batch's parts, each times its share, made one after another: a graph is gone before the next is.
    """
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    leaves = [leaf(parameter) for parameter in parameters]
    for loss in losses:
        torch.autograd.backward(loss, inputs=leaves)  # of what is shared out it takes the mean over ranks too
    ranks.average([p.grad for p in parameters if p.grad is not None and not is_shared(p)])
    norm = clip_gradients(parameters, clip, ranks)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(norm)


def descend(
    loss_of: Callable[[range], Tensor],
    parts: Parts,
    optimizer: Optimizer,
    clip: float,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Move the student down the gradient of one loss over a batch; return the scalars to log.

    Args:
        loss_of: rows of the batch -> their mean loss [].
    """
    logs = Means()

    def losses() -> Iterator[Tensor]:
        for part in parts:
            loss = loss_of(part)
            logs.add(parts.share(part), loss=loss)
            yield parts.share(part) * loss

    norm = update(losses(), [optimizer], clip, ranks)
    return {**logs, "student_norm": norm}


def clip_gradients(parameters: Sequence[Tensor], most: float, ranks: Ranks = ALONE) -> Tensor:
    """Scale gradients so that their norm over all parameters, and over all ranks' parts, is at most `most`.

    Returns:
        [] the norm before.
    """
    shared = [own(p.grad) for p in parameters if p.grad is not None and is_shared(p)]
    others = [p.grad for p in parameters if p.grad is not None and not is_shared(p)]
    norm = torch.nn.utils.get_total_norm(others)
    if shared:
        square = torch.nn.utils.get_total_norm(shared).square()
        norm = (norm.to(square.device).square() + ranks.sum(square)).sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradients in (shared, others):
        if gradients:
            torch._foreach_mul_(gradients, factor)
    return norm


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


class Judged:
    """The logits of a batch, which its parts give one after another, and what they say of the discriminator."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, real: Tensor, fake: Tensor, t: Tensor) -> None:
        """Add a part's logits [b, places] of both sides, at times [b]."""
        self._parts.append((real.detach(), fake.detach(), t))

    def _all(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(each) for each in zip(*self._parts, strict=True))

    def order(self) -> dict[str, float]:
        """Return how far real logits lie above fake ones on average, and in what share of the rows (.5: blind).

        Where both sides are steps of length dt from one point, as in ADM, the two distributions overlap all but for a
        share of the order of dt, so that no discriminator can give them two signs; a seeing one still orders them.
        """
        real, fake, _ = self._all()
        ordered = (real.mean(1) > fake.mean(1)).float().mean().item()
        return {"margin": (real - fake).mean().item(), "ordered": ordered}

    def accuracy(self) -> dict[str, float]:
        """Return, in thirds of the time axis, how often a row's mean logit is right, and how often hinge is satisfied.

        accuracy_t*: the right sign (.5: blind).   saturation_t*: beyond the hinge's margin, where nothing is learnt.
        """
        real, fake, t = self._all()
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
