"""`attention`: the one place that chooses what computes it."""

import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelUnavailable
from .availability import why_not_triton
from .preparation import Preparation

Impl = Literal["auto", "triton", "torch", "reference"]
Layout = Literal["bhnd", "bnhd"]

_log = logging.getLogger(__name__)
_logged: set[str] = set()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    preparation: Preparation | None = None,
    layout: Layout = "bhnd",
    impl: Impl = "auto",
) -> Tensor:
    """Attend every query to every key that the mask keeps: self-, cross- or joint attention, never causal.

    Args:
        q: [b, h, n, d], or [b, n, h, d] for layout "bnhd"; any strides.
        k, v: the same with m tokens; n and m are any numbers from 1 up.
            fp16, bf16 or fp32, one dtype for all; sums are in fp32. Under autocast they are cast first, as torch casts
            the inputs of its own attention.
        scale: factor of the scores before the softmax; d ** -0.5 by default.
        key_padding_mask: [b, m] bool, True where a key may be seen. A query without any key gets zeros.
        preparation: the norm and the rotary embedding that q and k pass through first; the kernels do both as they
            load q and k.
        layout: the order of dimensions of q, k, v and of the result.
        impl: "triton" runs the kernels or raises; "auto" runs them where they can run, else "torch", and logs once why;
            "torch" is PyTorch's scaled_dot_product_attention; "reference" is the definition, in fp32.
    Returns:
        o: shape, layout and dtype of q. Gradients of q, k, v and of a norm's weights exist for every impl. With
        "triton" and "reference", a sample's bytes do not depend on the rest of the batch.
    Raises:
        KernelUnavailable: impl="triton" cannot run here.
        ValueError: shapes, dtypes or devices do not fit together.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, k, v = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (q, k, v))
        with torch.autocast(device, enabled=False):  # or the reference's fp32 products would be cast as well
            return attention(
                q,
                k,
                v,
                scale=scale,
                key_padding_mask=key_padding_mask,
                preparation=preparation,
                layout=layout,
                impl=impl,
            )
    if layout == "bnhd":
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    elif layout != "bhnd":
        raise ValueError(f"layout: expected 'bhnd' or 'bnhd', got {layout!r}")
    _check(q, k, v, key_padding_mask)
    if preparation is not None:
        preparation.check(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q, k, v, *(() if preparation is None else preparation.affine))
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    chosen = choose(impl, q, fused=preparation is not None, training=training)
    if chosen == "torch":
        q, k = (q, k) if preparation is None else preparation.prepare(q, k)
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        from . import operators

        if preparation is None:
            o, _ = operators.attention(q, k, v, key_padding_mask, scale, chosen)
        else:
            p = preparation
            o, _ = operators.attention_fused(
                q,
                k,
                v,
                key_padding_mask,
                *p.affine,
                p.cos,
                p.sin,
                p.norm,
                p.eps,
                p.split,
                p.rope_start,
                scale,
                chosen,
            )
    return o.transpose(1, 2) if layout == "bnhd" else o


def choose(
    impl: Impl, q: Tensor, *, fused: bool = False, training: bool = False
) -> Literal["triton", "torch", "reference"]:
    """Decide what computes attention for tensors like q.

    Args:
        fused: q and k are to be prepared.   training: gradients are needed.
    Raises:
        KernelUnavailable: impl="triton" cannot run on the device, dtype or head dimension of q.
        ValueError: impl is none of the four names.
    """
    if impl in ("torch", "reference"):
        return impl
    if impl not in ("auto", "triton"):
        raise ValueError(f"impl: expected 'auto', 'triton', 'torch' or 'reference', got {impl!r}")
    reason = why_not_triton(q.device, q.dtype, q.shape[-1], fused=fused, training=training)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise KernelUnavailable(f"impl='triton' cannot run here: {reason}")
    if reason not in _logged:
        _logged.add(reason)
        _log.warning("attention by torch, not by Triton: %s", reason)
    return "torch"


def _check(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"expected q, k and v with four dimensions, got {q.ndim}, {k.ndim} and {v.ndim}")
    b, h, _, d = q.shape
    m = k.shape[2]
    if k.shape != (b, h, m, d) or v.shape != k.shape or m == 0:
        raise ValueError(
            f"expected k and v of batch {b}, {h} heads, head dimension {d} and one length of 1 or more; got "
            f"k {tuple(k.shape)} and v {tuple(v.shape)} as [b, h, m, d]"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"expected one dtype and one device, got {q.dtype}, {k.dtype} and {v.dtype} on {q.device}, {k.device} "
            f"and {v.device}"
        )
    if key_padding_mask is not None:
        mask = key_padding_mask
        if mask.shape != (b, m) or mask.dtype != torch.bool or mask.device != q.device:
            raise ValueError(
                f"key_padding_mask: expected [{b}, {m}] bool on {q.device}, True where a key may be seen; got "
                f"{list(mask.shape)} {mask.dtype} on {mask.device}"
            )
