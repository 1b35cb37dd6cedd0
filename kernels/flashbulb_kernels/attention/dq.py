"""dQ by blocks of queries; a program owns OWNED pieces of their columns, as in `dkdv`."""

import triton
import triton.language as tl

from .pieces import add_products, load_pieces, scores, store_pieces, zero_pieces


@triton.jit
def dq_step(
    q, do, b_lse, b_delta, dq, o_n, NK, first,
    p_k, p_v, p_mask, stride_kn, stride_vn, scale_log2,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a block of keys gives to the gradient of a block of queries."""
    LOG2E: tl.constexpr = 1.4426950408889634
    k = load_pieces(p_k, stride_kn, o_n, NK, D, COLUMNS, MASKED)
    v = load_pieces(p_v, stride_vn, o_n, NK, D, COLUMNS, MASKED)
    b_s = scores(q, k, BLOCK_M, BLOCK_N, PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
    b_p = tl.math.exp2(b_s - (b_lse * LOG2E)[:, None])
    if HAS_MASK:
        b_p = tl.where((tl.load(p_mask + o_n, mask=o_n < NK, other=0) != 0)[None, :], b_p, 0.0)
    elif MASKED:
        b_p = tl.where((o_n < NK)[None, :], b_p, 0.0)
    b_dp = scores(do, v, BLOCK_M, BLOCK_N, PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return add_products(dq, b_ds, k, p_k, stride_kn, o_n, NK, first, D, COLUMNS, MASKED, PRECISION)


@triton.jit
def dq_kernel(
    p_q, p_k, p_v, p_mask, p_do, p_lse, p_delta, p_dq,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn,
    stride_mb, scale, H, NQ, NK,
    D: tl.constexpr, COLUMNS: tl.constexpr, OWNED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RELOAD: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute OWNED * COLUMNS columns of dQ of BLOCK_M queries over all keys.

    Grid: (PARTS * cdiv(NQ, BLOCK_M) * B * H,), the parts of a block side by side.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    num_blocks = tl.cdiv(NQ, BLOCK_M)
    i_block = tl.program_id(0) // PARTS
    first = tl.program_id(0) % PARTS * (OWNED * COLUMNS)
    o_m = i_block % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    i_bh = i_block // num_blocks
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    if HAS_MASK:
        p_mask += i_b * stride_mb

    o_rows = i_bh.to(tl.int64) * NQ + o_m
    q = load_pieces(p_q + i_b * stride_qb + i_h * stride_qh, stride_qn, o_m, NQ, D, COLUMNS, True)
    do = load_pieces(p_do + i_b * stride_dob + i_h * stride_doh, stride_don, o_m, NQ, D, COLUMNS, True)
    b_lse = tl.load(p_lse + o_rows, mask=o_m < NQ, other=float("inf"))
    b_delta = tl.load(p_delta + o_rows, mask=o_m < NQ, other=0.0)
    dq = zero_pieces(BLOCK_M, COLUMNS, OWNED)

    whole = NK // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N, disable_licm=RELOAD):
        o_n = start + tl.arange(0, BLOCK_N)
        dq = dq_step(
            q, do, b_lse, b_delta, dq, o_n, NK, first, p_k, p_v, p_mask, stride_kn, stride_vn, scale * LOG2E,
            D, COLUMNS, BLOCK_M, BLOCK_N, False, HAS_MASK, PRECISION,
        )  # fmt: skip
    if whole < NK:
        o_n = whole + tl.arange(0, BLOCK_N)
        dq = dq_step(
            q, do, b_lse, b_delta, dq, o_n, NK, first, p_k, p_v, p_mask, stride_kn, stride_vn, scale * LOG2E,
            D, COLUMNS, BLOCK_M, BLOCK_N, True, HAS_MASK, PRECISION,
        )  # fmt: skip

    p_dq += i_b * stride_dqb + i_h * stride_dqh
    store_pieces(p_dq, stride_dqn, o_m, NQ, first, dq, scale, D, COLUMNS)
