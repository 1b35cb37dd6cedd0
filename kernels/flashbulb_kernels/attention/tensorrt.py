"""The forward kernel as TensorRT calls it: contiguous tensors, 32-bit sizes, the output last, no log-sum-exp.

An ahead-of-time plugin of TensorRT passes tensor inputs, then integers, then tensor outputs, and nothing else; so the
scale is a compile-time constant, and strides follow from the sizes.
"""

import triton
import triton.language as tl

from .blocks import finish_softmax, load_rows, softmax_step, store_rows


@triton.jit
def tensorrt_kernel(
    p_q, p_k, p_v, NQ, NK, p_o,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of contiguous (B, H, N, D). Grid: (cdiv(NQ, BLOCK_M), B * H)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    i_bh = tl.program_id(1).to(tl.int64)
    p_q += i_bh * NQ * D
    p_k += i_bh * NK * D
    p_v += i_bh * NK * D
    p_o += i_bh * NQ * D

    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_q = load_rows(p_q, D, o_m, NQ, D, BLOCK_D, True)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    whole = NK // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, D, o_n, NK, D, BLOCK_D, False)
        b_v = load_rows(p_v, D, o_n, NK, D, BLOCK_D, False)
        b_acc, b_max, b_sum = softmax_step(
            b_q, b_k, b_v, b_acc, b_max, b_sum, o_n, NK, p_k, SCALE * LOG2E, False, False, PRECISION
        )
    if whole < NK:
        o_n = whole + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, D, o_n, NK, D, BLOCK_D, True)
        b_v = load_rows(p_v, D, o_n, NK, D, BLOCK_D, True)
        b_acc, b_max, b_sum = softmax_step(
            b_q, b_k, b_v, b_acc, b_max, b_sum, o_n, NK, p_k, SCALE * LOG2E, True, False, PRECISION
        )

    b_o, _ = finish_softmax(b_acc, b_max, b_sum)
    store_rows(p_o, D, o_m, NQ, b_o, D, BLOCK_D)
