"""How far a kernel may be from the truth, derived from what its dtype costs anyone.

The truth is the reference in fp64. The yardstick is the error of plain attention that rounds every intermediate value
to the dtype of its inputs. A kernel sums in fp32: at 16 bits it is closer than the yardstick; at 32 bits it is plain
attention in another order of sums, and may be as far on the other side.

    allowed = 2 * yardstick  +  half a rounding of the largest value  +  8 fp32 roundings of what cancels in the sums
            + one fp32 rounding of lse, times the largest value: a weight is exp(score - lse)
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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

    @property
    def share(self) -> float:
        """Return the error as a share of what is allowed; infinite where it is NaN."""
        if self.error == self.error:
            return self.error / self.allowed if self.allowed else float(self.error > 0)
        return float("inf")

    def __str__(self) -> str:
        return f"error {self.error:.1e} of {self.allowed:.1e} allowed (plain torch: {self.yardstick:.1e})"


def closeness(
    result: Tensor, truth: Tensor, plain: Tensor, terms: float = 0.0, largest_lse: float = 0.0
) -> Closeness:
    """Compare a kernel's result with the truth (fp64) and with plain torch in the kernel's dtype.

    Args:
        terms: size of the numbers whose sum the result is; matters where they cancel, as in dQ and dK.
        largest_lse: of the log-sum-exp; matters for gradients in fp32 where scores are large.
    """
    if result.numel() == 0:
        return Closeness(0.0, 0.0, 0.0)
    yardstick = _largest(plain.double() - truth)
    rounding = torch.finfo(result.dtype).eps / 2 * _largest(truth)
    sums = torch.finfo(torch.float32).eps * (8 * terms + largest_lse * _largest(truth))
    return Closeness(_largest(result.double() - truth), 2 * yardstick + rounding + sums, yardstick)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, scale: float) -> Tensor:
    """Compute attention as the formula reads, every step rounded to the dtype of q; differentiable."""
    scores = (scale * q) @ k.mT
    if key_padding_mask is not None:
        scores = scores.masked_fill(~key_padding_mask[:, None, None, :], -torch.inf)
    # a query without keys gives NaN; the definition says 0
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max())
