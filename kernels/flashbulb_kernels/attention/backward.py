"""The backward pass: delta, then dK and dV by blocks of keys, then dQ by blocks of queries.

    p     = exp(scale * q k^T - lse)              rebuilt block by block, never stored
    delta = rowsum(dO * O) - dLSE
    dS    = p * (dO v^T - delta)
    dV = p^T dO      dK = scale * dS^T q      dQ = scale * dS k

Every program owns its rows of the result and adds in a fixed order: no atomics, the same bytes in every run and batch.
Source: Dao 2023, "FlashAttention-2", arXiv 2307.08691, algorithm 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Tile, block_d
from .blocks import load_rows, store_rows
from .launch import aligned_rows, launch_on, mask_arguments, precision, strides


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


@triton.jit
def dkdv_step(
    b_k, b_v, b_dk, b_dv, m_keys, o_m, NQ,
    p_q, p_do, p_lse, p_delta, stride_qn, stride_don, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a block of queries gives to the gradients of a block of keys; scores are transposed, [keys, queries]."""
    LOG2E: tl.constexpr = 1.4426950408889634
    b_q = load_rows(p_q, stride_qn, o_m, NQ, D, BLOCK_D, MASKED)  # [BLOCK_M, BLOCK_D]
    b_do = load_rows(p_do, stride_don, o_m, NQ, D, BLOCK_D, MASKED)
    if MASKED:
        # a query beyond the end weighs exp(-inf) = 0
        b_lse = tl.load(p_lse + o_m, mask=o_m < NQ, other=float("inf"))
        b_delta = tl.load(p_delta + o_m, mask=o_m < NQ, other=0.0)
    else:
        b_lse = tl.load(p_lse + o_m)
        b_delta = tl.load(p_delta + o_m)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2  # [BLOCK_N, BLOCK_M]
    b_p = tl.math.exp2(b_s - (b_lse * LOG2E)[None, :])
    if HAS_MASK:
        b_p = tl.where(m_keys[:, None], b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def dkdv_kernel(
    p_q, p_k, p_v, p_mask, p_do, p_lse, p_delta, p_dk, p_dv,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don,
    stride_dkb, stride_dkh, stride_dkn,
    stride_dvb, stride_dvh, stride_dvn,
    stride_mb, scale, H, NQ, NK,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RELOAD: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV of BLOCK_N keys over all queries. Grid: (cdiv(NK, BLOCK_N) * B * H,)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    num_blocks = tl.cdiv(NK, BLOCK_N)
    o_n = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    i_bh = tl.program_id(0) // num_blocks
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    p_q += i_b * stride_qb + i_h * stride_qh
    p_do += i_b * stride_dob + i_h * stride_doh
    p_lse += i_bh.to(tl.int64) * NQ
    p_delta += i_bh.to(tl.int64) * NQ

    b_k = load_rows(p_k + i_b * stride_kb + i_h * stride_kh, stride_kn, o_n, NK, D, BLOCK_D, True)
    b_v = load_rows(p_v + i_b * stride_vb + i_h * stride_vh, stride_vn, o_n, NK, D, BLOCK_D, True)
    # Keys beyond the end need no mask: their rows are zero, and their gradients are not stored.
    m_keys = o_n < NK
    if HAS_MASK:
        m_keys = tl.load(p_mask + i_b * stride_mb + o_n, mask=m_keys, other=0) != 0
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

    whole = NQ // BLOCK_M * BLOCK_M
    for start in tl.range(0, whole, BLOCK_M, disable_licm=RELOAD):
        o_m = start + tl.arange(0, BLOCK_M)
        b_dk, b_dv = dkdv_step(
            b_k, b_v, b_dk, b_dv, m_keys, o_m, NQ, p_q, p_do, p_lse, p_delta, stride_qn, stride_don,
            scale * LOG2E, D, BLOCK_D, False, HAS_MASK, PRECISION,
        )  # fmt: skip
    if whole < NQ:
        o_m = whole + tl.arange(0, BLOCK_M)
        b_dk, b_dv = dkdv_step(
            b_k, b_v, b_dk, b_dv, m_keys, o_m, NQ, p_q, p_do, p_lse, p_delta, stride_qn, stride_don,
            scale * LOG2E, D, BLOCK_D, True, HAS_MASK, PRECISION,
        )  # fmt: skip

    store_rows(p_dk + i_b * stride_dkb + i_h * stride_dkh, stride_dkn, o_n, NK, b_dk * scale, D, BLOCK_D)
    store_rows(p_dv + i_b * stride_dvb + i_h * stride_dvh, stride_dvn, o_n, NK, b_dv, D, BLOCK_D)


@triton.jit
def dq_step(
    b_q, b_do, b_lse, b_delta, b_dq, o_n, NK,
    p_k, p_v, p_mask, stride_kn, stride_vn, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a block of keys gives to the gradient of a block of queries."""
    LOG2E: tl.constexpr = 1.4426950408889634
    b_k = load_rows(p_k, stride_kn, o_n, NK, D, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
    b_v = load_rows(p_v, stride_vn, o_n, NK, D, BLOCK_D, MASKED)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
    b_p = tl.math.exp2(b_s - (b_lse * LOG2E)[:, None])
    if HAS_MASK:
        b_p = tl.where((tl.load(p_mask + o_n, mask=o_n < NK, other=0) != 0)[None, :], b_p, 0.0)
    elif MASKED:
        b_p = tl.where((o_n < NK)[None, :], b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def dq_kernel(
    p_q, p_k, p_v, p_mask, p_do, p_lse, p_delta, p_dq,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn,
    stride_mb, scale, H, NQ, NK,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RELOAD: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dQ of BLOCK_M queries over all keys. Grid: (cdiv(NQ, BLOCK_M) * B * H,)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    num_blocks = tl.cdiv(NQ, BLOCK_M)
    o_m = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    i_bh = tl.program_id(0) // num_blocks
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    if HAS_MASK:
        p_mask += i_b * stride_mb

    o_rows = i_bh.to(tl.int64) * NQ + o_m
    b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, stride_qn, o_m, NQ, D, BLOCK_D, True)
    b_do = load_rows(p_do + i_b * stride_dob + i_h * stride_doh, stride_don, o_m, NQ, D, BLOCK_D, True)
    b_lse = tl.load(p_lse + o_rows, mask=o_m < NQ, other=float("inf"))
    b_delta = tl.load(p_delta + o_rows, mask=o_m < NQ, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    whole = NK // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N, disable_licm=RELOAD):
        o_n = start + tl.arange(0, BLOCK_N)
        b_dq = dq_step(
            b_q, b_do, b_lse, b_delta, b_dq, o_n, NK, p_k, p_v, p_mask, stride_kn, stride_vn,
            scale * LOG2E, D, BLOCK_D, False, HAS_MASK, PRECISION,
        )  # fmt: skip
    if whole < NK:
        o_n = whole + tl.arange(0, BLOCK_N)
        b_dq = dq_step(
            b_q, b_do, b_lse, b_delta, b_dq, o_n, NK, p_k, p_v, p_mask, stride_kn, stride_vn,
            scale * LOG2E, D, BLOCK_D, True, HAS_MASK, PRECISION,
        )  # fmt: skip

    store_rows(p_dq + i_b * stride_dqb + i_h * stride_dqh, stride_dqn, o_m, NQ, b_dq * scale, D, BLOCK_D)


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
    tiles: dict[str, Tile],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels; arguments and result as in `reference.attention_backward_reference`.

    Args:
        tiles: of the entries "delta", "dkdv" and "dq".
    """
    b, h, n, d = q.shape
    m = k.shape[2]
    q, k, v, o, grad_o = (aligned_rows(tensor) for tensor in (q, k, v, o, grad_o))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    deltas = delta(o, grad_o, grad_lse.contiguous(), tiles["delta"])
    mask, mask_stride = mask_arguments(key_padding_mask)
    shared = {"D": d, "BLOCK_D": block_d(d), "HAS_MASK": mask is not None, "PRECISION": precision(q.dtype)}
    with launch_on(q):
        tile = tiles["dkdv"]
        dkdv_kernel[(triton.cdiv(m, tile.block_n) * b * h,)](
            q, k, v, mask, grad_o, lse, deltas, dk, dv,
            *strides(q), *strides(k), *strides(v), *strides(grad_o), *strides(dk), *strides(dv),
            mask_stride, scale, h, n, m, **shared,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, RELOAD=tile.reload,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        tile = tiles["dq"]
        dq_kernel[(triton.cdiv(n, tile.block_m) * b * h,)](
            q, k, v, mask, grad_o, lse, deltas, dq,
            *strides(q), *strides(k), *strides(v), *strides(grad_o), *strides(dq),
            mask_stride, scale, h, n, m, **shared,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, RELOAD=tile.reload,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return dq, dk, dv
