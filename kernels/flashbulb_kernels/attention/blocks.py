"""What the attention kernels share: how rows are loaded, and one step of the online softmax."""

import triton
import triton.language as tl


@triton.jit
def load_rows(p, stride, o_n, N, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load rows o_n of an (N, D) matrix into a [BLOCK_N, BLOCK_D] block; what lies outside is zero.

    Addresses are int64: a row times its stride passes 2**31 in long videos. MASKED=False promises o_n < N.
    """
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p + o_n.to(tl.int64)[:, None] * stride + o_d[None, :]
    if MASKED:
        b_rows = tl.load(p_rows, mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        b_rows = tl.load(p_rows)
    else:
        b_rows = tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
    return b_rows


@triton.jit
def store_rows(p, stride, o_n, N, b_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a [BLOCK_N, BLOCK_D] block into rows o_n of an (N, D) matrix, in the matrix's dtype."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p + o_n.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p_rows, b_rows.to(p.dtype.element_ty), mask=(o_n < N)[:, None] & (o_d < D)[None, :])


@triton.jit
def softmax_step(
    b_q, b_k, b_v, b_acc, b_max, b_sum, o_n, NK, p_mask, scale_log2,
    MASKED: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into the running softmax of a block of queries.

    Args:
        b_q: [BLOCK_M, BLOCK_D].   b_k, b_v: [BLOCK_N, BLOCK_D].
        b_acc: [BLOCK_M, BLOCK_D] fp32, sum of exp2(score - max) * v.
        b_max, b_sum: [BLOCK_M] fp32, the largest score (base 2) and the sum of exp2(score - max) so far.
    Source:
        Milakov & Gimelshein 2018, arXiv 1805.02867; Dao 2023, "FlashAttention-2", arXiv 2307.08691, algorithm 1.
    """
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N] fp32
    if HAS_MASK:
        m_n = tl.load(p_mask + o_n, mask=o_n < NK, other=0) != 0
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    elif MASKED:
        b_s = tl.where((o_n < NK)[None, :], b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    if HAS_MASK:
        # Until a first key is seen the maximum is -inf, and -inf - -inf would be NaN.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    else:
        b_shift = b_new_max
    b_p = tl.math.exp2(b_s - b_shift[:, None])
    b_decay = tl.math.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
    return b_acc, b_new_max, b_sum


@triton.jit
def finish_softmax(b_acc, b_max, b_sum):
    """Return the output block and its log-sum-exp (natural logarithm); 0 and -inf where no key was seen."""
    LN2: tl.constexpr = 0.6931471805599453
    m_seen = b_sum > 0
    b_o = b_acc / tl.where(m_seen, b_sum, 1.0)[:, None]
    b_lse = tl.where(m_seen, (b_max + tl.math.log2(tl.where(m_seen, b_sum, 1.0))) * LN2, float("-inf"))
    return b_o, b_lse
