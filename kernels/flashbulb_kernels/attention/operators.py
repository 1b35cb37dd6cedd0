"""The operators `flashbulb::attention` and `flashbulb::attention_backward`, as torch.compile and torch.export see them.

They take [b, h, n, d] in any strides, and return tensors in the order of strides of their inputs. `impl` is "triton" or
"reference"; `dispatch.attention` is what users call.
"""

from typing import Any

import torch
from torch import Tensor

from ..tiles import tile_for
from .availability import DTYPES, arch_of
from .launch import aligned_rows
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

        tiles = {
            entry: tile_for(entry, DTYPES[q.dtype], q.shape[-1], arch_of(q.device))
            for entry in ("delta", "dkdv", "dq")
        }
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


def _empty(tensor: Tensor) -> Tensor:
    """Return what the launchers allocate for a result like the tensor: its order of strides, with dense rows."""
    return torch.empty_like(aligned_rows(tensor))
