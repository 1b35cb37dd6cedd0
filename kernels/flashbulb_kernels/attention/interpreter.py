"""Triton's interpreter, on which the kernels run where there is no GPU: for tests, not for speed.

It is chosen by TRITON_INTERPRET=1 before Triton is imported.
"""

import functools
from typing import Any

import triton.language as tl
import triton.runtime.interpreter as triton_interpreter


@functools.cache
def mend_bf16() -> None:
    """Make the interpreter's `tl.dot` read bf16 as numbers, once per process.

    Triton 3.9 keeps bf16 as uint16 and multiplies those integers, without an error. Products of bf16 are exact in fp32,
    so widening the operands gives what a tensor core gives.
    """
    builder = triton_interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    builder.create_dot = widened
