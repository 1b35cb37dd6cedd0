"""How far a kernel may be from the truth, derived from what its dtype costs anyone.

The truth is the reference in fp64. The yardstick is plain attention that keeps every intermediate value in the dtype of
its inputs; a kernel, which accumulates in fp32, has to be as close as that, or within a few roundings of the result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDINGS = 4  # of the largest value: kernels round p and the result once each, gradients a few times more


@dataclass(frozen=True, slots=True)
class Closeness:
    """The largest difference from the truth, what is allowed, and what plain torch in the same dtype has."""

    error: float
    allowed: float
    yardstick: float

    @property
    def ok(self) -> bool:
        """Say whether the error is within what is allowed; NaN never is."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"error {self.error:.1e} of {self.allowed:.1e} allowed (plain torch: {self.yardstick:.1e})"


def closeness(result: Tensor, truth: Tensor, plain: Tensor) -> Closeness:
    """Compare a kernel's result with the truth (fp64) and with plain torch in the kernel's dtype."""
    if result.numel() == 0:
        return Closeness(0.0, 0.0, 0.0)
    yardstick = _largest(plain.double() - truth)
    rounding = torch.finfo(result.dtype).eps * _largest(truth)
    return Closeness(_largest(result.double() - truth), yardstick + ROUNDINGS * rounding, yardstick)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, scale: float) -> Tensor:
    """Compute attention as the formula reads, every step rounded to the dtype of q; differentiable."""
    scores = (scale * q) @ k.mT
    if key_padding_mask is not None:
        scores = scores.masked_fill(~key_padding_mask[:, None, None, :], -torch.inf)
    # a query without keys gives NaN; the definition says 0
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
