"""The operators `flashbulb::attention`, `attention_fused` and `attention_backward`, as torch's compilers see them.

They take [b, h, n, d] in any strides, and return tensors in the order of strides of their inputs. `impl` is "triton" or
"reference"; `dispatch.attention` is what users call.
"""

from typing import Any, cast

import torch
from torch import Tensor

from ..tiles import backward_entries, tile_for
from .availability import DTYPES, arch_of
from .launch import aligned_rows
from .preparation import Norm, Preparation
from .reference import attention_backward_reference, attention_reference


@torch.library.custom_op("flashbulb::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    """Compute o and lse as `reference.attention_reference` defines them."""
    if impl == "triton":
        from .forward import forward

        tile = tile_for("forward", DTYPES[q.dtype], q.shape[-1], arch_of(q.device))
        return forward(q, k, v, key_padding_mask, scale, tile)
    o, lse = attention_reference(q, k, v, key_padding_mask, scale)
    return _empty(q).copy_(o), lse.float()


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("flashbulb::attention_backward", mutates_args=())
def attention_backward(
    grad_o: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v as `reference.attention_backward_reference` defines them."""
    if impl == "triton":
        from .backward import backward

        cell = DTYPES[q.dtype], q.shape[-1], arch_of(q.device)
        tiles = {entry: tile_for(entry, *cell) for entry in backward_entries(*cell)}
        return backward(grad_o, grad_lse, q, k, v, o, lse, key_padding_mask, scale, tiles)
    dq, dk, dv = attention_backward_reference(grad_o, grad_lse, q, k, v, o, lse, key_padding_mask, scale)
    return _empty(q).copy_(dq), _empty(k).copy_(dk), _empty(v).copy_(dv)


@attention_backward.register_fake
def _(
    grad_o: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_padding_mask, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, key_padding_mask, *output)


def _gradients(ctx: Any, grad_o: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, key_padding_mask, o, lse = ctx.saved_tensors
    grads = torch.ops.flashbulb.attention_backward(
        grad_o, grad_lse, q, k, v, o, lse, key_padding_mask, ctx.scale, ctx.impl
    )
    return *grads, None, None, None


attention.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("flashbulb::attention_fused", mutates_args=())
def attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    split: int,
    rope_start: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Compute o and lse of q and k as `preparation.Preparation` prepares them."""
    p = Preparation(cast(Norm, norm), eps, q_weight, q_bias, k_weight, k_bias, split, cos, sin, rope_start)
    if impl == "triton":
        from .fused import fused_forward

        tile = tile_for("fused", DTYPES[q.dtype], q.shape[-1], arch_of(q.device))
        return fused_forward(q, k, v, key_padding_mask, p, scale, tile)
    o, lse = attention_reference(*p.prepare(q, k), v, key_padding_mask, scale)
    return _empty(q).copy_(o), lse.float()


@attention_fused.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _save_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.rest = inputs[10:]


def _fused_gradients(ctx: Any, grad_o: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Prepare q and k again in torch, run the backward kernels on them, and go back through the preparation."""
    q, k, v, key_padding_mask, q_weight, q_bias, k_weight, k_bias, cos, sin, o, lse = ctx.saved_tensors
    norm, eps, split, rope_start, scale, impl = ctx.rest
    with torch.enable_grad():
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        affine = [
            None if x is None else x.detach().requires_grad_() for x in (q_weight, q_bias, k_weight, k_bias)
        ]
        named = dict(zip(("q_weight", "q_bias", "k_weight", "k_bias"), affine, strict=True))
        preparation = Preparation(norm, eps, split=split, cos=cos, sin=sin, rope_start=rope_start, **named)
        prepared = preparation.prepare(q, k)
    dq, dk, dv = torch.ops.flashbulb.attention_backward(
        grad_o, grad_lse, *(x.detach() for x in prepared), v, o, lse, key_padding_mask, scale, impl
    )
    leaves = [x for x in (q, k, *affine) if x is not None]
    dq, dk, *given = torch.autograd.grad(prepared, leaves, (dq, dk))
    grad_affine = [None if x is None else given.pop(0) for x in affine]
    return dq, dk, dv, None, *grad_affine, *(None,) * 8


attention_fused.register_autograd(_fused_gradients, setup_context=_save_fused)


def _empty(tensor: Tensor) -> Tensor:
    """Return what the launchers allocate for a result like the tensor: its order of strides, with dense rows."""
    return torch.empty_like(aligned_rows(tensor))
