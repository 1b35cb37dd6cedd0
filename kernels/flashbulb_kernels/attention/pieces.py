"""A head in pieces of its columns: [rows, COLUMNS] blocks in a tuple, the smallest unit that a kernel loads and adds.

A block's columns are a power of two, and a head's need not be: 80 are three pieces of 32 with 16 to spare, where one
block would hold 128. And a program that owns some pieces of a result needs registers for those alone.
"""
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - a tuple grows as Triton unrolls a loop, and Triton knows no starred expression

import triton
import triton.language as tl


@triton.jit
def load_piece(p, stride, o_n, N, start, D: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Load rows o_n and columns from `start` of an (N, D) matrix, [BLOCK_N, COLUMNS]; what lies outside is zero.

    Addresses are int64: a row times its stride passes 2**31 in long videos. MASKED=False promises o_n < N.
    """
    o_d = start + tl.arange(0, COLUMNS)
    p_rows = p + o_n.to(tl.int64)[:, None] * stride + o_d[None, :]
    if MASKED:
        b_rows = tl.load(p_rows, mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D % COLUMNS == 0:
        b_rows = tl.load(p_rows)
    else:
        b_rows = tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
    return b_rows


@triton.jit
def load_pieces(p, stride, o_n, N, D: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Load rows o_n of an (N, D) matrix in pieces."""
    pieces = ()
    for start in tl.static_range(0, D, COLUMNS):
        pieces = pieces + (load_piece(p, stride, o_n, N, start, D, COLUMNS, MASKED),)
    return pieces


@triton.jit
def store_pieces(p, stride, o_n, N, first, pieces, factor, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Store pieces times a factor into rows o_n and columns from `first` of an (N, D) matrix, in its dtype."""
    for i in tl.static_range(len(pieces)):
        b_rows = pieces[i] * factor
        o_d = first + i * COLUMNS + tl.arange(0, COLUMNS)
        p_rows = p + o_n.to(tl.int64)[:, None] * stride + o_d[None, :]
        tl.store(p_rows, b_rows.to(p.dtype.element_ty), mask=(o_n < N)[:, None] & (o_d < D)[None, :])


@triton.jit
def zero_pieces(BLOCK: tl.constexpr, COLUMNS: tl.constexpr, OWNED: tl.constexpr):
    """Return OWNED pieces of zeros, fp32."""
    pieces = ()
    for _ in tl.static_range(OWNED):
        pieces = pieces + (tl.zeros([BLOCK, COLUMNS], dtype=tl.float32),)
    return pieces


@triton.jit
def scores(a, b, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr):
    """Return a b^T of two matrices in pieces, [BLOCK_A, BLOCK_B] fp32."""
    b_s = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    for i in tl.static_range(len(a)):
        b_s = tl.dot(a[i], tl.trans(b[i]), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def add_products(
    pieces, b_w, matrix, p, stride, o_n, N, first,
    D: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return pieces + w x, where x is a block of rows o_n of an (N, D) matrix and w weighs them.

    Args:
        pieces: those owned, [BLOCK, COLUMNS] fp32 each, for the columns from `first`.
        b_w: [BLOCK, rows] fp32.
        matrix: every piece of x, used where all are owned; else the owned ones are read again from p.
    """
    added = ()
    for i in tl.static_range(len(pieces)):
        if len(pieces) == len(matrix):
            b_x = matrix[i]
        else:
            b_x = load_piece(p, stride, o_n, N, first + i * COLUMNS, D, COLUMNS, MASKED)
        added = added + (tl.dot(b_w.to(b_x.dtype), b_x, pieces[i], input_precision=PRECISION),)
    return added
