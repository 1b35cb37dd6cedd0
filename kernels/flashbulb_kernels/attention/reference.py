"""What attention is, in plain torch: the definition that every kernel is compared with.

    o   = softmax(scale * q k^T) v          over the keys that the mask keeps
    lse = log sum exp(scale * q k^T)        one number per query

A query that may see no key at all has o = 0, lse = -inf and no gradient. Everything is computed in fp32 (fp64 for
fp64 inputs) and rounded once at the end. It holds the whole [b, h, n, m] matrix: for checks, not for speed.
"""

import torch
from torch import Tensor


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention and its log-sum-exp; differentiable by autograd.

    Args:
        q: [b, h, n, d].   k, v: [b, h, m, d].
        key_padding_mask: [b, m] bool, True where a key may be seen; None keeps all.
        scale: factor of the scores before the softmax.
    Returns:
        o: [b, h, n, d] in the dtype of q.   lse: [b, h, n] in fp32 (fp64 for fp64 inputs).
    """
    wide = _wide(q)
    scores = _scores(q.to(wide), k.to(wide), key_padding_mask, scale)  # [b, h, n, m]
    lse = torch.logsumexp(scores, dim=-1)
    return (_weights(scores, lse) @ v.to(wide)).to(q.dtype), lse


def attention_backward_reference(
    grad_o: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `attention_reference` from what its forward pass returned.

    Returns:
        grad_q, grad_k, grad_v in the shapes and dtypes of q, k, v.
    Source:
        Dao et al. 2022, "FlashAttention", arXiv 2205.14135, appendix B.2; the term of lse follows from d lse / d s = p.
    """
    wide = _wide(q)
    q_, k_, v_, grad_o_ = q.to(wide), k.to(wide), v.to(wide), grad_o.to(wide)
    p = _weights(_scores(q_, k_, key_padding_mask, scale), lse)
    delta = (grad_o_ * o.to(wide)).sum(-1) - grad_lse  # [b, h, n]
    grad_scores = p * (grad_o_ @ v_.mT - delta[..., None])
    grad_q = scale * grad_scores @ k_
    grad_k = scale * grad_scores.mT @ q_
    grad_v = p.mT @ grad_o_
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _scores(q: Tensor, k: Tensor, key_padding_mask: Tensor | None, scale: float) -> Tensor:
    scores = scale * (q @ k.mT)
    if key_padding_mask is None:
        return scores
    return scores.masked_fill(~key_padding_mask[:, None, None, :], -torch.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # -inf - -inf is NaN: a query without keys is given a finite log-sum-exp, and its weights become exp(-inf) = 0.
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
