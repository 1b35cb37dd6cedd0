"""Triton's interpreter, on which the kernels run where there is no GPU: for tests, not for speed.

It is chosen by TRITON_INTERPRET=1 before Triton is imported.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter


@functools.cache
def mend_bf16() -> None:
    """Make the interpreter compute with bf16 as a GPU does, once per process.

    Triton 3.9 keeps bf16 as uint16 and has two faults there, neither of which raises. `tl.dot` multiplies those
    integers; products of bf16 are exact in fp32, so widening the operands gives what a tensor core gives. And fp32
    becomes bf16 by cutting bits off, where a GPU rounds to nearest even.
    """
    builder = triton_interpreter.InterpreterBuilder
    create_dot, cast_impl = builder.create_dot, builder.cast_impl

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    def cast(self: Any, source: Any, to: Any) -> Any:
        match source.dtype.scalar, to.scalar:
            case (tl.float32, tl.bfloat16):
                return triton_interpreter.TensorHandle(_round_to_bf16(source.data), tl.bfloat16)
            case (tl.bfloat16, tl.float32):
                wide = (source.data.astype(np.uint32) << 16).view(np.float32)
                return triton_interpreter.TensorHandle(wide, tl.float32)
        return cast_impl(self, source, to)

    builder.create_dot, builder.cast_impl = dot, cast


def _round_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    half = 0x7FFF + (bits >> 16 & 1)  # a tie goes to the even neighbour
    # adding to a NaN could run over into infinity or zero
    return np.where(np.isnan(values), 0x7FC0, (bits.astype(np.uint64) + half) >> 16).astype(np.uint16)
