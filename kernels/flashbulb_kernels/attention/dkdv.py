"""dK and dV by blocks of keys: together, or each by programs of its own where both would not fit in registers.

Apart they take five products for four, since both need p. A program owns OWNED pieces of the columns of its rows: where
those are not all, every further program computes p and dS again, and reads its pieces of q and dO a second time.
"""

import triton
import triton.language as tl

from .pieces import add_products, load_pieces, scores, store_pieces, zero_pieces


@triton.jit
def load_delta(p_delta, o_m, NQ, MASKED: tl.constexpr):
    """Load rows o_m of delta; zero beyond the end."""
    if MASKED:
        b_delta = tl.load(p_delta + o_m, mask=o_m < NQ, other=0.0)
    else:
        b_delta = tl.load(p_delta + o_m)
    return b_delta


@triton.jit
def dkdv_step(
    k, v, dk, dv, m_keys, o_m, NQ, first,
    p_q, p_do, p_lse, p_delta, stride_qn, stride_don, scale_log2,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    GIVES_DK: tl.constexpr, GIVES_DV: tl.constexpr,
):  # fmt: skip
    """Add what a block of queries gives to the gradients of a block of keys; scores are transposed, [keys, queries]."""
    LOG2E: tl.constexpr = 1.4426950408889634
    q = load_pieces(p_q, stride_qn, o_m, NQ, D, COLUMNS, MASKED)
    do = ()
    if GIVES_DV and (GIVES_DK or len(dv) == len(k)):
        do = load_pieces(p_do, stride_don, o_m, NQ, D, COLUMNS, MASKED)
    if MASKED:
        # a query beyond the end weighs exp(-inf) = 0
        b_lse = tl.load(p_lse + o_m, mask=o_m < NQ, other=float("inf"))
    else:
        b_lse = tl.load(p_lse + o_m)
    if GIVES_DK and GIVES_DV:
        b_delta = load_delta(p_delta, o_m, NQ, MASKED)
    b_s = scores(k, q, BLOCK_N, BLOCK_M, PRECISION) * scale_log2  # [BLOCK_N, BLOCK_M]
    b_p = tl.math.exp2(b_s - (b_lse * LOG2E)[None, :])
    if HAS_MASK:
        b_p = tl.where(m_keys[:, None], b_p, 0.0)
    if GIVES_DV:
        dv = add_products(dv, b_p, do, p_do, stride_don, o_m, NQ, first, D, COLUMNS, MASKED, PRECISION)
    if GIVES_DK:
        if not GIVES_DV:
            # Loaded before the scores they would be held all along: at 96 columns that spills 272 bytes on sm_80.
            do = load_pieces(p_do, stride_don, o_m, NQ, D, COLUMNS, MASKED)
            b_delta = load_delta(p_delta, o_m, NQ, MASKED)
        b_dp = scores(v, do, BLOCK_N, BLOCK_M, PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        dk = add_products(dk, b_ds, q, p_q, stride_qn, o_m, NQ, first, D, COLUMNS, MASKED, PRECISION)
    return dk, dv


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
    D: tl.constexpr, COLUMNS: tl.constexpr, OWNED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RELOAD: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, GIVES_DK: tl.constexpr, GIVES_DV: tl.constexpr,
):  # fmt: skip
    """Compute dK, dV or both of BLOCK_N keys over all queries, OWNED * COLUMNS columns of them.

    Grid: (PARTS * cdiv(NK, BLOCK_N) * B * H,), the parts of a block side by side. A pointer that is not given is None.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    num_blocks = tl.cdiv(NK, BLOCK_N)
    i_block = tl.program_id(0) // PARTS
    first = tl.program_id(0) % PARTS * (OWNED * COLUMNS)
    o_n = i_block % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    i_bh = i_block // num_blocks
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    p_q += i_b * stride_qb + i_h * stride_qh
    p_do += i_b * stride_dob + i_h * stride_doh
    p_lse += i_bh.to(tl.int64) * NQ
    if GIVES_DK:
        p_delta += i_bh.to(tl.int64) * NQ

    k = load_pieces(p_k + i_b * stride_kb + i_h * stride_kh, stride_kn, o_n, NK, D, COLUMNS, True)
    v = ()
    dk = ()
    dv = ()
    if GIVES_DK:
        v = load_pieces(p_v + i_b * stride_vb + i_h * stride_vh, stride_vn, o_n, NK, D, COLUMNS, True)
        dk = zero_pieces(BLOCK_N, COLUMNS, OWNED)
    if GIVES_DV:
        dv = zero_pieces(BLOCK_N, COLUMNS, OWNED)
    # Keys beyond the end need no mask: their rows are zero, and their gradients are not stored.
    m_keys = o_n < NK
    if HAS_MASK:
        m_keys = tl.load(p_mask + i_b * stride_mb + o_n, mask=m_keys, other=0) != 0

    whole = NQ // BLOCK_M * BLOCK_M
    for start in tl.range(0, whole, BLOCK_M, disable_licm=RELOAD):
        o_m = start + tl.arange(0, BLOCK_M)
        dk, dv = dkdv_step(
            k, v, dk, dv, m_keys, o_m, NQ, first, p_q, p_do, p_lse, p_delta, stride_qn, stride_don, scale * LOG2E,
            D, COLUMNS, BLOCK_M, BLOCK_N, False, HAS_MASK, PRECISION, GIVES_DK, GIVES_DV,
        )  # fmt: skip
    if whole < NQ:
        o_m = whole + tl.arange(0, BLOCK_M)
        dk, dv = dkdv_step(
            k, v, dk, dv, m_keys, o_m, NQ, first, p_q, p_do, p_lse, p_delta, stride_qn, stride_don, scale * LOG2E,
            D, COLUMNS, BLOCK_M, BLOCK_N, True, HAS_MASK, PRECISION, GIVES_DK, GIVES_DV,
        )  # fmt: skip

    if GIVES_DK:
        p_dk += i_b * stride_dkb + i_h * stride_dkh
        store_pieces(p_dk, stride_dkn, o_n, NK, first, dk, scale, D, COLUMNS)
    if GIVES_DV:
        p_dv += i_b * stride_dvb + i_h * stride_dvh
        store_pieces(p_dv, stride_dvn, o_n, NK, first, dv, 1.0, D, COLUMNS)
