"""From a component to an ONNX file: traced once, weights written one after another, kept by content.

Weights above `EXTERNAL_BYTES` lie in a file beside the graph, since a protobuf holds no more than 2 GB; they are
written a tensor at a time, so that an export needs the memory of the weights and little more.
"""

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from .families import Component, exportable

OPSETS = (18, 23)
EXTERNAL_BYTES = 1 << 30
GRAPH = "model.onnx"


def export_component(
    component: Component, folder: Path, *, opset: int = 18, cache: Path | None = None
) -> Path:
    """Write a component's graph, and its weights beside it where they are large, and return the graph's path.

    The graph's arithmetic is that of the weights' type; its inputs and outputs are float32.

    Args:
        folder: of this component alone; it appears whole or not at all.
        opset: 18 for the widest reach and TensorRT-RTX, 23 keeps attention as one node.
        cache: where exports are kept by content; an equal one is copied instead of traced again.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: the opset is none of OPSETS.
    """
    if opset not in OPSETS:
        raise ValueError(f"expected an opset of {OPSETS}, got {opset}")
    if folder.exists():
        raise FileExistsError(f"{folder}: expected a new folder, but it exists; remove it or choose another")
    kept = None if cache is None else cache / content_hash(component, opset)
    if kept is None or not (kept / GRAPH).exists():
        target = folder if kept is None else kept
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _trace(component, partial / GRAPH, opset)
        partial.rename(target)
    if kept is not None:
        shutil.copytree(kept, folder)
    return folder / GRAPH


def content_hash(component: Component, opset: int) -> str:
    """Return the hash of all that a graph is made from: weights, configuration, shapes, and who makes it."""
    found = hashlib.sha256()
    facts = {
        "opset": opset,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "code": Path(__file__).with_name("families.py").read_text(encoding="utf-8"),
        "module": [type(part).__qualname__ for part in component.module.modules()],
        "config": [_config(child) for child in component.module.children()],
        "inputs": {name: [list(value.shape), str(value.dtype)] for name, value in component.inputs.items()},
        "axes": {name: dict(axes) for name, axes in component.axes.items()},
        "outputs": component.outputs,
    }
    found.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, value in component.module.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(memoryview(_bytes(value)))
    return found.hexdigest()


def _trace(component: Component, path: Path, opset: int) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    with exportable(), _quietly():
        program = torch.onnx.export(
            component.module.eval(),
            tuple(component.inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=list(component.inputs),
            output_names=list(component.outputs),
            dynamic_shapes=tuple(dict.fromkeys(component.axes[name], dynamic) for name in component.inputs),
            verbose=False,
        )
    assert program is not None
    _strip(program.model)
    program.save(path, external_data=_weight_bytes(component.module) > EXTERNAL_BYTES)
    onnx.checker.check_model(path)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's own remarks (torchvision is missing, tree specs change) off our users' screens."""
    exporter = logging.getLogger("torch.onnx._internal.exporter")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            exporter.setLevel(level)


def _strip(model: Any) -> None:
    """Drop what the exporter noted about its own run: source paths and traces, which differ between machines."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


def _config(module: nn.Module) -> Any:
    config: Any = getattr(module, "config", None) or {}
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _weight_bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
