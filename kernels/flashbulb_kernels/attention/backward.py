"""The backward pass: delta, then dK and dV by blocks of keys, then dQ by blocks of queries.

    p     = exp(scale * q k^T - lse)              rebuilt block by block, never stored
    delta = rowsum(dO * O) - dLSE
    dS    = p * (dO v^T - delta)
    dV = p^T dO      dK = scale * dS^T q      dQ = scale * dS k

Every element of a result is computed by one program, which adds in a fixed order: no atomics, the same bytes in every
run and batch. Source: Dao 2023, "FlashAttention-2", arXiv 2307.08691, algorithm 2.
"""

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from ..tiles import Tile
from .delta import delta
from .dkdv import dkdv_kernel
from .dq import dq_kernel
from .launch import aligned_rows, launch_on, mask_arguments, precision, strides


def backward(
    grad_o: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    tiles: Mapping[str, Tile],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels; arguments and result as in `reference.attention_backward_reference`.

    Args:
        tiles: of the entries "delta" and "dq", and of "dkdv" or of both "dk" and "dv": see `tiles.backward_entries`.
    """
    b, h, n, d = q.shape
    m = k.shape[2]
    q, k, v, o, grad_o = (aligned_rows(tensor) for tensor in (q, k, v, o, grad_o))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    deltas = delta(o, grad_o, grad_lse.contiguous(), tiles["delta"])
    mask, mask_stride = mask_arguments(key_padding_mask)
    shared = {"D": d, "HAS_MASK": mask is not None, "PRECISION": precision(q.dtype)}
    read = (*strides(q), *strides(k), *strides(v), *strides(grad_o))
    with launch_on(q):
        for entry in ("dkdv", "dk", "dv"):
            if (tile := tiles.get(entry)) is None:
                continue
            gives_dk, gives_dv = entry != "dv", entry != "dk"
            grid = (tile.parts(d) * triton.cdiv(m, tile.block_n) * b * h,)
            dkdv_kernel[grid](
                q, k, v, mask, grad_o, lse, deltas, dk if gives_dk else None, dv if gives_dv else None,
                *read, *strides(dk), *strides(dv), mask_stride, scale, h, n, m,
                **shared, **tile.constants(d), GIVES_DK=gives_dk, GIVES_DV=gives_dv,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        tile = tiles["dq"]
        dq_kernel[(tile.parts(d) * triton.cdiv(n, tile.block_m) * b * h,)](
            q, k, v, mask, grad_o, lse, deltas, dq, *read, *strides(dq), mask_stride, scale, h, n, m,
            **shared, **tile.constants(d), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dq, dk, dv
