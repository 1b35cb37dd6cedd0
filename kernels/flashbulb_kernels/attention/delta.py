"""The first step of the backward pass: delta = rowsum(dO * O) - dLSE."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Tile, block_d
from .blocks import load_rows
from .launch import launch_on, strides


@triton.jit
def delta_kernel(
    p_o, p_do, p_dlse, p_delta,
    stride_ob, stride_oh, stride_on,
    stride_dob, stride_doh, stride_don,
    H, NQ,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write delta = rowsum(dO * O) - dLSE, in fp32. Grid: (cdiv(NQ, BLOCK_M) * B * H,)."""
    num_blocks = tl.cdiv(NQ, BLOCK_M)
    o_m = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    i_bh = tl.program_id(0) // num_blocks
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_rows = i_bh.to(tl.int64) * NQ + o_m
    b_o = load_rows(p_o + i_b * stride_ob + i_h * stride_oh, stride_on, o_m, NQ, D, BLOCK_D, True)
    b_do = load_rows(p_do + i_b * stride_dob + i_h * stride_doh, stride_don, o_m, NQ, D, BLOCK_D, True)
    b_dlse = tl.load(p_dlse + o_rows, mask=o_m < NQ, other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1) - b_dlse  # [BLOCK_M]
    tl.store(p_delta + o_rows, b_delta, mask=o_m < NQ)


def delta(o: Tensor, grad_o: Tensor, grad_lse: Tensor, tile: Tile) -> Tensor:
    """Launch the delta kernel: [b, h, n] fp32."""
    b, h, n, d = o.shape
    result = torch.empty_like(grad_lse)
    with launch_on(o):
        delta_kernel[(triton.cdiv(n, tile.block_m) * b * h,)](
            o, grad_o, grad_lse, result, *strides(o), *strides(grad_o), h, n,
            D=d, BLOCK_D=block_d(d), BLOCK_M=tile.block_m,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return result
