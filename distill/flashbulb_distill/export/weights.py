"""The demo family's text encoder holds its weights inside its graph: matrices as int8 rows, all else as it is."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .graph import UNPLACED


def hold_inside(model: ir.Model, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Put the weights that a graph from `trace_graph` names into it, matrices as int8 values and one scale a row.

    A runtime multiplies them out once, when it loads the graph.

    Args:
        weights: by the names in the graph. Rows of matrices are whole multiples of a scale, as `TextEncoder` leaves
            them; so nothing is lost.
    Raises:
        ValueError: a matrix has other rows.
    """
    making: list[ir.Node] = []
    for value in list(model.graph.initializers.values()):
        if not isinstance(value.const_value, ir.ExternalTensor) or value.const_value.location != UNPLACED:
            continue
        assert value.name is not None
        weight = weights[value.name]
        if weight.ndim == 2:
            making += _int8_rows(model.graph, value, weight)
        else:
            value.const_value = ir.tensor(weight, name=value.name)
    if making:
        model.graph.insert_before(model.graph[0], making)


def _int8_rows(graph: ir.Graph, value: ir.Value, matrix: NDArray[np.float32]) -> list[ir.Node]:
    """Replace a matrix by int8 * scale; return the nodes that multiply."""
    name = value.name
    assert name is not None
    scales = np.maximum(np.abs(matrix).max(axis=1, keepdims=True), 1e-12) / np.float32(127)
    rows = np.round(matrix / scales).astype(np.int8)
    if not np.allclose(rows * scales, matrix, atol=1e-6):
        raise ValueError(f"{name}: expected rows that are multiples of one scale each, got others")
    del graph.initializers[name]
    stored = []
    for part, content in (("int8", rows), ("scale", scales.astype(np.float32))):
        tensor = ir.tensor(content, name=f"{name}/{part}")
        stored.append(
            ir.Value(
                name=tensor.name,
                shape=ir.Shape(content.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        )
        graph.register_initializer(stored[-1])
    cast = ir.node("Cast", [stored[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}/cast")
    product = ir.node("Mul", [cast.outputs[0], stored[1]], name=f"{name}/rows")
    for node in (cast, product):
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = node.name, value.shape, value.type
    value.const_value = None
    value.replace_all_uses_with(product.outputs[0])
    return [cast, product]
