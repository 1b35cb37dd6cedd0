"""The forward pass: flash attention that keeps the log-sum-exp for the backward pass.

One program computes BLOCK_M queries of one head over all keys, in a fixed order. Nothing is shared between programs (no
split keys, no atomics), so a result cannot depend on the batch size or on what else is in the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Tile, block_d
from .blocks import finish_softmax, load_rows, softmax_step, store_rows
from .launch import aligned_rows, launch_on, mask_arguments, precision, strides


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_mask, p_o, p_lse,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    stride_mb, scale, H, NQ, NK,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RELOAD: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(NQ, BLOCK_M) * B * H,), the blocks of one head side by side, so that they share its keys in L2."""
    LOG2E: tl.constexpr = 1.4426950408889634
    num_blocks = tl.cdiv(NQ, BLOCK_M)
    i_m = tl.program_id(0) % num_blocks
    i_bh = tl.program_id(0) // num_blocks
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    if HAS_MASK:
        p_mask += i_b * stride_mb

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, stride_qn, o_m, NQ, D, BLOCK_D, True)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    whole = NK // BLOCK_N * BLOCK_N  # blocks without a tail need no comparison per score
    for start in tl.range(0, whole, BLOCK_N, disable_licm=RELOAD):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, stride_kn, o_n, NK, D, BLOCK_D, False)
        b_v = load_rows(p_v, stride_vn, o_n, NK, D, BLOCK_D, False)
        b_acc, b_max, b_sum = softmax_step(
            b_q, b_k, b_v, b_acc, b_max, b_sum, o_n, NK, p_mask, scale * LOG2E, False, HAS_MASK, PRECISION
        )
    if whole < NK:
        o_n = whole + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, stride_kn, o_n, NK, D, BLOCK_D, True)
        b_v = load_rows(p_v, stride_vn, o_n, NK, D, BLOCK_D, True)
        b_acc, b_max, b_sum = softmax_step(
            b_q, b_k, b_v, b_acc, b_max, b_sum, o_n, NK, p_mask, scale * LOG2E, True, HAS_MASK, PRECISION
        )

    b_o, b_lse = finish_softmax(b_acc, b_max, b_sum)
    store_rows(p_o + i_b * stride_ob + i_h * stride_oh, stride_on, o_m, NQ, b_o, D, BLOCK_D)
    tl.store(p_lse + i_bh.to(tl.int64) * NQ + o_m, b_lse, mask=o_m < NQ)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, scale: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; shapes and result as in `reference.attention_reference`."""
    b, h, n, d = q.shape
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    o = torch.empty_like(q)
    lse = q.new_empty((b, h, n), dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    mask, mask_stride = mask_arguments(key_padding_mask)
    grid = (triton.cdiv(n, tile.block_m) * b * h,)
    with launch_on(q):
        forward_kernel[grid](
            q, k, v, mask, o, lse, *strides(q), *strides(k), *strides(v), *strides(o),
            mask_stride, scale, h, n, k.shape[2],
            D=d, BLOCK_D=block_d(d), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, RELOAD=tile.reload,
            HAS_MASK=mask is not None, PRECISION=precision(q.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return o, lse
