"""What the methods need of a network, whatever its family: an output, and features of its blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.schedule import Prediction, Schedule, to_x0


@dataclass(frozen=True, slots=True)
class Condition:
    """Text embeddings: tokens [b, length, width] and pooled [b, width]."""

    tokens: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def take(self, rows: Tensor) -> "Condition":
        """Return the given rows, int64 [n]."""
        return Condition(self.tokens[rows], self.pooled[rows])

    def expand(self, count: int) -> "Condition":
        """Repeat a condition of one row `count` times, without copying."""
        return Condition(self.tokens.expand(count, -1, -1), self.pooled.expand(count, -1))


def join(first: Condition, second: Condition) -> Condition:
    """Stack two conditions along the batch."""
    return Condition(torch.cat([first.tokens, second.tokens]), torch.cat([first.pooled, second.pooled]))


class Denoiser(nn.Module):
    """A diffusion network: latents xt [b, c, h, w], times t [b] in [0, 1] and a condition in, an output like xt out.

    Subclasses say what the output means (`prediction`, `schedule`) and implement `forward` and `features`.
    """

    prediction: Prediction
    schedule: Schedule

    def features(self, xt: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]) -> list[Tensor]:
        """Return the feature maps [b, width, h, w] after the numbered blocks."""
        raise NotImplementedError

    def x0(self, xt: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Estimate the clean latents, float32 like xt."""
        return read_x0(self, self(xt, t, cond), xt, t)


def read_x0(denoiser: Denoiser, out: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """Read a denoiser's output at (xt, t [b]) as the clean latents it stands for."""
    at: Tensor = to_x0(denoiser.prediction, denoiser.schedule, out, xt, spread(t, xt))
    return at


def spread(t: Tensor, like: Tensor) -> Tensor:
    """Shape times [b] to broadcast over [b, ...]."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def guided_x0(
    denoiser: Denoiser, xt: Tensor, t: Tensor, cond: Condition, uncond: Condition, scale: float
) -> Tensor:
    """Estimate the clean latents with classifier-free guidance: uncond + scale (cond - uncond).

    The same in x0 as in any other prediction, since they are linear in one another at fixed (xt, t).

    Args:
        uncond: one row, the empty prompt. Not used for scale 1.
    """
    if scale == 1:
        return denoiser.x0(xt, t, cond)
    both = join(cond, uncond.expand(len(cond)))
    with_text, without = denoiser.x0(torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)
    return without + scale * (with_text - without)
