"""Write activations and norms as runtimes know them, so that each becomes one kernel; the numbers stay the same.

torch's exporter spells GELU as x (0.5 (1 + f)) and an RMS norm as x (1 / sqrt(v)). onnxruntime looks for (0.5 x)(1 + f)
and x / sqrt(v), and leaves other spellings as a chain of a dozen operators.
"""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern, rewrite


def make_fusable(model: ir.Model) -> ir.Model:
    """Return the model with every GELU and RMS norm in the spelling that onnxruntime fuses."""
    return rewrite(model, pattern_rewrite_rules=[*_GELU, _RMS_NORM])


def _gelu(function: str) -> pattern.RewriteRule:
    def spelt_by_torch(op: Any, x: Any, inner: Any, half: Any, one: Any) -> Any:
        return op.Mul(x, op.Mul(half, op.Add(getattr(op, function)(inner), one)))

    def spelt_for_runtimes(op: Any, x: Any, inner: Any, half: Any, one: Any) -> Any:
        return op.Mul(op.Mul(x, half), op.Add(getattr(op, function)(inner), one))

    def is_gelu(context: Any, half: ir.Value, one: ir.Value, **_: Any) -> bool:
        return _is(half, 0.5) and _is(one, 1.0)

    return pattern.RewriteRule(spelt_by_torch, spelt_for_runtimes, is_gelu)


def _norm_by_torch(op: Any, x: Any, square: Any) -> Any:
    return op.Mul(x, op.Reciprocal(op.Sqrt(square)))


def _norm_for_runtimes(op: Any, x: Any, square: Any) -> Any:
    return op.Div(x, op.Sqrt(square))


def _is(value: ir.Value, number: float) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.size == 1 and float(tensor.numpy().reshape(())) == number


_GELU = [rule for name in ("Tanh", "Erf") for rule in _gelu(name).commute()]
_RMS_NORM = pattern.RewriteRule(_norm_by_torch, _norm_for_runtimes)
