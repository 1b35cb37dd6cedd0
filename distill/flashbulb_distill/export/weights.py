"""Where an exported graph's weights live: in a safetensors file beside it, or inside as int8 rows.

The exporter folds weights into the graph as float32, some transposed. Both functions here find them again by their
content, so that neither depends on the names which an exporter gives.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SMALL = 256  # initialisers of fewer numbers stay inside the graph

# A weight as the graph should hold it: stored tensors, and how to make the float32 matrix of them.
Stored = tuple[list[TensorProto], list[onnx.NodeProto]]


def use_safetensors(model: onnx.ModelProto, folder: Path, location: str) -> None:
    """Replace float32 weights of a graph by the float16 tensors of the file `folder`/`location`, as external data.

    A runtime casts them to float32 once, when it loads the graph.

    Raises:
        ValueError: a weight of the graph is in no tensor of the file.
    """
    path = folder / location
    with path.open("rb") as handle:
        (header_bytes,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(header_bytes))
        data_start = 8 + header_bytes
        contents: dict[str, NDArray[np.float16]] = {}
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] != "F16":
                continue
            start, end = entry["data_offsets"]
            handle.seek(data_start + start)
            raw = np.frombuffer(handle.read(end - start), dtype=np.float16)
            contents[name] = raw.reshape(entry["shape"])

    def store(name: str, output: str) -> Stored:
        start, end = header[name]["data_offsets"]
        tensor = TensorProto(name=f"{output}/float16", data_type=TensorProto.FLOAT16)
        tensor.dims.extend(header[name]["shape"])
        tensor.data_location = TensorProto.EXTERNAL
        places = {"location": location, "offset": data_start + start, "length": end - start}
        for key, value in places.items():
            tensor.external_data.add(key=key, value=str(value))
        return [tensor], [helper.make_node("Cast", [tensor.name], [output], to=TensorProto.FLOAT)]

    floats = {name: value.astype(np.float32) for name, value in contents.items()}
    missing = _replace(model, floats, store)
    if missing:
        raise ValueError(
            f"{path}: expected the weights of the graph, found none for {', '.join(missing[:3])}"
        )


def quantise_inside(model: onnx.ModelProto, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Replace the named matrices [rows, columns] of a graph by int8 values and one scale a row.

    Args:
        weights: matrices whose rows are whole multiples of a scale, as `TextEncoder` leaves them; so nothing is lost.
    """

    def store(name: str, output: str) -> Stored:
        matrix = weights[name]
        scales = np.maximum(np.abs(matrix).max(axis=1, keepdims=True), 1e-12) / np.float32(127)
        values = np.round(matrix / scales).astype(np.int8)
        tensors = [
            numpy_helper.from_array(values, f"{output}/int8"),
            numpy_helper.from_array(scales.astype(np.float32), f"{output}/scale"),
        ]
        if not np.allclose(values * scales, matrix, atol=1e-6):
            raise ValueError(f"{name}: expected rows that are multiples of one scale each, got others")
        nodes = [
            helper.make_node("Cast", [f"{output}/int8"], [f"{output}/float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{output}/float", f"{output}/scale"], [output]),
        ]
        return tensors, nodes

    _replace(model, weights, store)


def _replace(
    model: onnx.ModelProto,
    weights: Mapping[str, NDArray[np.float32]],
    store: Callable[[str, str], Stored],
) -> list[str]:
    """Swap initialisers for stored weights of equal content; return the names of large ones that match none."""
    known: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for name, value in weights.items():
        known[_content(value)] = (name, None)
        if value.ndim == 2:
            known.setdefault(_content(value.T), (name, (1, 0)))
    graph = model.graph
    kept, added, nodes, missing = [], [], [], []
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype != np.float32 or value.size < SMALL:
            kept.append(tensor)
            continue
        found = known.get(_content(value))
        if found is None:
            kept.append(tensor)
            missing.append(tensor.name)
            continue
        name, axes = found
        output = tensor.name if axes is None else f"{tensor.name}/untransposed"
        tensors, making = store(name, output)
        added += tensors
        nodes += making
        if axes is not None:
            nodes.append(helper.make_node("Transpose", [output], [tensor.name], perm=axes))
    del graph.initializer[:]
    graph.initializer.extend([*kept, *added])
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *body])
    replaced = {node.output[0] for node in nodes}
    values = [value for value in graph.value_info if value.name not in replaced]
    del graph.value_info[:]
    graph.value_info.extend(values)
    return missing


def _content(value: NDArray[np.float32]) -> str:
    shape = "x".join(map(str, value.shape))
    return shape + hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
