"""The second entry: flash attention that normalises and rotates q and k as it loads them.

As `forward.forward_kernel`, but every block of q and of k passes through qk-norm (RMS or LayerNorm per head) and rotary
embedding in registers, in fp32, and is rounded once. Saved are a write and a read of q and k each, and the launches of
the norms and rotations; paid is the same work on k in every block of queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Tile, block_d
from .blocks import finish_softmax, load_rows, softmax_step, store_rows
from .launch import aligned_rows, launch_on, mask_arguments, precision, strides
from .preparation import Preparation


@triton.jit
def load_weights(
    p_weight, p_bias, D: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr, SPLIT: tl.constexpr
):
    """Load the norm's weights and biases of both segments, [BLOCK_D] each; unused ones are zero."""
    o_d = tl.arange(0, BLOCK_D)
    b_zero = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_w0, b_w1, b_b0, b_b1 = b_zero, b_zero, b_zero, b_zero
    if NORM != "none":
        b_w0 = tl.load(p_weight + o_d, mask=o_d < D, other=0.0)
        if SPLIT:
            b_w1 = tl.load(p_weight + D + o_d, mask=o_d < D, other=0.0)
    if NORM == "layer":
        b_b0 = tl.load(p_bias + o_d, mask=o_d < D, other=0.0)
        if SPLIT:
            b_b1 = tl.load(p_bias + D + o_d, mask=o_d < D, other=0.0)
    return b_w0, b_w1, b_b0, b_b1


@triton.jit
def prepare_rows(
    b_x, o_n, N, b_w0, b_w1, b_b0, b_b1, split, eps, p_cos, p_sin, rope_start,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM: tl.constexpr, SPLIT: tl.constexpr, HAS_ROPE: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate rows o_n, [BLOCK_N, BLOCK_D], as `preparation.prepare_reference` does."""
    b_y = b_x.to(tl.float32)
    if NORM == "layer":
        m_d = tl.arange(0, BLOCK_D) < D
        b_y = tl.where(m_d[None, :], b_y - (tl.sum(b_y, 1) / D)[:, None], 0.0)
    if NORM != "none":
        b_y = b_y * tl.math.rsqrt(tl.sum(b_y * b_y, 1) / D + eps)[:, None]
        if SPLIT:
            m_first = (o_n < split)[:, None]
            b_y = b_y * tl.where(m_first, b_w0[None, :], b_w1[None, :])
            if NORM == "layer":
                b_y += tl.where(m_first, b_b0[None, :], b_b1[None, :])
        else:
            b_y = b_y * b_w0[None, :]
            if NORM == "layer":
                b_y += b_b0[None, :]
    if HAS_ROPE:
        HALF: tl.constexpr = BLOCK_D // 2
        o_pair = tl.arange(0, HALF)
        o_table = (o_n - rope_start).to(tl.int64)[:, None] * (D // 2) + o_pair[None, :]
        m_table = ((o_n >= rope_start) & (o_n < N))[:, None] & (o_pair < D // 2)[None, :]
        b_cos = tl.load(p_cos + o_table, mask=m_table, other=1.0)  # [BLOCK_N, HALF]
        b_sin = tl.load(p_sin + o_table, mask=m_table, other=0.0)
        b_even, b_odd = tl.split(tl.reshape(b_y, [BLOCK_N, HALF, 2]))
        b_turned = tl.join(b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin)
        b_y = tl.reshape(b_turned, [BLOCK_N, BLOCK_D])
    return b_y.to(b_x.dtype)


@triton.jit
def fused_kernel(
    p_q, p_k, p_v, p_mask, p_q_weight, p_q_bias, p_k_weight, p_k_bias, p_cos, p_sin, p_o, p_lse,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    stride_mb, scale, eps, split, rope_start, H, NQ, NK,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RELOAD: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    NORM: tl.constexpr, SPLIT: tl.constexpr, HAS_ROPE: tl.constexpr,
):  # fmt: skip
    """Grid and result as of `forward.forward_kernel`."""
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
    b_w0, b_w1, b_b0, b_b1 = load_weights(p_q_weight, p_q_bias, D, BLOCK_D, NORM, SPLIT)
    b_q = prepare_rows(
        b_q, o_m, NQ, b_w0, b_w1, b_b0, b_b1, split, eps, p_cos, p_sin, rope_start,
        BLOCK_M, D, BLOCK_D, NORM, SPLIT, HAS_ROPE,
    )  # fmt: skip
    b_w0, b_w1, b_b0, b_b1 = load_weights(p_k_weight, p_k_bias, D, BLOCK_D, NORM, SPLIT)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    whole = NK // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N, disable_licm=RELOAD):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, stride_kn, o_n, NK, D, BLOCK_D, False)
        b_v = load_rows(p_v, stride_vn, o_n, NK, D, BLOCK_D, False)
        b_k = prepare_rows(
            b_k, o_n, NK, b_w0, b_w1, b_b0, b_b1, split, eps, p_cos, p_sin, rope_start,
            BLOCK_N, D, BLOCK_D, NORM, SPLIT, HAS_ROPE,
        )  # fmt: skip
        b_acc, b_max, b_sum = softmax_step(
            b_q, b_k, b_v, b_acc, b_max, b_sum, o_n, NK, p_mask, scale * LOG2E, False, HAS_MASK, PRECISION
        )
    if whole < NK:
        o_n = whole + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, stride_kn, o_n, NK, D, BLOCK_D, True)
        b_v = load_rows(p_v, stride_vn, o_n, NK, D, BLOCK_D, True)
        b_k = prepare_rows(
            b_k, o_n, NK, b_w0, b_w1, b_b0, b_b1, split, eps, p_cos, p_sin, rope_start,
            BLOCK_N, D, BLOCK_D, NORM, SPLIT, HAS_ROPE,
        )  # fmt: skip
        b_acc, b_max, b_sum = softmax_step(
            b_q, b_k, b_v, b_acc, b_max, b_sum, o_n, NK, p_mask, scale * LOG2E, True, HAS_MASK, PRECISION
        )

    b_o, b_lse = finish_softmax(b_acc, b_max, b_sum)
    store_rows(p_o + i_b * stride_ob + i_h * stride_oh, stride_on, o_m, NQ, b_o, D, BLOCK_D)
    tl.store(p_lse + i_bh.to(tl.int64) * NQ + o_m, b_lse, mask=o_m < NQ)


def fused_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    preparation: Preparation,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Launch the fused kernel: attention of the prepared q and k; shapes and result as of `forward.forward`."""
    b, h, n, d = q.shape
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    o = torch.empty_like(q)
    lse = q.new_empty((b, h, n), dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    mask, mask_stride = mask_arguments(key_padding_mask)
    p = preparation
    tables = [None if table is None else table.float().contiguous() for table in (p.cos, p.sin)]
    with launch_on(q):
        fused_kernel[(triton.cdiv(n, tile.block_m) * b * h,)](
            q, k, v, mask, *_affine(p.q_weight, p.q_bias, p, q), *_affine(p.k_weight, p.k_bias, p, k),
            *tables, o, lse, *strides(q), *strides(k), *strides(v), *strides(o),
            mask_stride, scale, p.eps, p.split, p.rope_start, h, n, k.shape[2],
            D=d, BLOCK_D=block_d(d), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, RELOAD=tile.reload,
            HAS_MASK=mask is not None, PRECISION=precision(q.dtype),
            NORM=p.norm, SPLIT=p.split > 0, HAS_ROPE=p.cos is not None,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return o, lse


def _affine(
    weight: Tensor | None, bias: Tensor | None, preparation: Preparation, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias as the kernel reads them, fp32, [segments, d]; ones and zeros where there are none."""
    if preparation.norm == "none":
        return None, None
    shape = (2 if preparation.split else 1, like.shape[-1])
    ones = like.new_ones(shape, dtype=torch.float32)
    zeros = None if preparation.norm == "rms" else torch.zeros_like(ones)
    return (
        ones if weight is None else weight.float().contiguous(),
        zeros if bias is None else bias.float().contiguous(),
    )
