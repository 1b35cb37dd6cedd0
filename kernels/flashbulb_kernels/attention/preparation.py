"""What SD3.5 and CogVideoX do to q and k before attention: a norm per head, then a rotation per token.

    norm    y = x / sqrt(mean(x^2) + eps) * weight                      "rms":   Zhang & Sennrich 2019, arXiv 1910.07467
            y = (x - mean) / sqrt(var + eps) * weight + bias            "layer": Ba et al. 2016, arXiv 1607.06450
    rope    (y0, y1) -> (y0 cos - y1 sin, y1 cos + y0 sin)              Su et al. 2021, arXiv 2104.09864

for each pair (y0, y1) of neighbouring components. Both in fp32, rounded once at the end. Text and image tokens lie in
one sequence: two segments may have weights of their own (SD3.5), and the first tokens may stay unrotated (CogVideoX).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["none", "rms", "layer"]


@dataclass(frozen=True, slots=True)
class Preparation:
    """How q and k are prepared.

    Args:
        norm: which norm over a head's components; "none" for a rotation alone.
        eps: added to the mean square or the variance.
        q_weight, k_weight: [d], or [2, d]: one row for tokens before `split` and one for the others; None is all ones.
        q_bias, k_bias: the same for "layer"; None is all zeros.
        split: the first token of the second segment; 0 where there is one segment.
        cos, sin: [n - rope_start, d // 2] for tokens from `rope_start` on, angle per pair; None for no rotation.
        rope_start: the first token that is rotated.
    """

    norm: Norm = "none"
    eps: float = 1e-6
    q_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    split: int = 0
    cos: Tensor | None = None
    sin: Tensor | None = None
    rope_start: int = 0

    @property
    def affine(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return the norms' weights and biases, in the order of the operator."""
        return self.q_weight, self.q_bias, self.k_weight, self.k_bias

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raise ValueError where this does not fit q and k, [b, h, n, d]."""
        d = q.shape[-1]
        rows = [2, d] if self.split else [d]
        if self.norm not in ("none", "rms", "layer"):
            raise ValueError(f"norm: expected 'none', 'rms' or 'layer', got {self.norm!r}")
        if not 0 <= self.split <= min(q.shape[2], k.shape[2]):
            raise ValueError(f"split: expected 0 to {min(q.shape[2], k.shape[2])} tokens, got {self.split}")
        for name in ("q_weight", "k_weight", "q_bias", "k_bias"):
            affine = getattr(self, name)
            allowed = self.norm == "layer" or (self.norm == "rms" and name.endswith("weight"))
            if affine is not None and not allowed:
                raise ValueError(f"{name}: the norm {self.norm!r} has none, got {list(affine.shape)}")
            if affine is not None and list(affine.shape) != rows:
                raise ValueError(f"{name}: expected {rows} for split={self.split}, got {list(affine.shape)}")
        if (self.cos is None) != (self.sin is None):
            raise ValueError("expected both cos and sin or neither of them, got one")
        if self.cos is None or self.sin is None:
            return
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"a rotation needs q and k of one length, got {q.shape[2]} and {k.shape[2]}")
        table = [q.shape[2] - self.rope_start, d // 2]
        if list(self.cos.shape) != table or list(self.sin.shape) != table or not self.rope_start >= 0:
            raise ValueError(
                f"cos and sin: expected {table}, one row per token from rope_start={self.rope_start} on and one "
                f"column per pair of components; got {list(self.cos.shape)} and {list(self.sin.shape)}"
            )

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and k normalised and rotated: the definition, differentiable by autograd."""
        return (
            prepare_reference(q, self, self.q_weight, self.q_bias),
            prepare_reference(k, self, self.k_weight, self.k_bias),
        )


def prepare_reference(
    x: Tensor, preparation: Preparation, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Normalise and rotate x [b, h, n, d] in fp32 (fp64 for fp64), rounded once to its dtype."""
    p = preparation
    y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if p.norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if p.norm != "none":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + p.eps)
        if weight is not None:
            y = y * _per_token(weight, p.split, x.shape[2]).to(y.dtype)
        if bias is not None:
            y = y + _per_token(bias, p.split, x.shape[2]).to(y.dtype)
    if p.cos is not None and p.sin is not None:
        still, turning = y[:, :, : p.rope_start], y[:, :, p.rope_start :]
        cos, sin = p.cos.to(y.dtype), p.sin.to(y.dtype)
        even, odd = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        y = torch.cat((still, turned), dim=2)
    return y.to(x.dtype)


def _per_token(affine: Tensor, split: int, n: int) -> Tensor:
    """Return a norm's weight or bias for every token: [d], or [n, d] where there are two segments."""
    if not split:
        return affine
    return torch.cat((affine[0].expand(split, -1), affine[1].expand(n - split, -1)))
