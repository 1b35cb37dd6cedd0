"""From a component to an ONNX graph without its weights, which stay in safetensors files beside it.

The tracer sees shapes only and constant folding is kept from the weights, so a graph depends on the network's
configuration alone: an export needs no memory beyond the weights', and one of other weights comes out of the cache.
"""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import onnx
import onnx_ir as ir
import onnxscript
import torch
import transformers
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript.optimizer import optimize_ir
from torch import nn

from .families import Component
from .fusable import make_fusable
from .positions import exportable

OPSETS = (18, 23)  # 18: widest reach, TensorRT-RTX; 23: attention whole, for fused kernels
UNPLACED = "unplaced"  # the file that a weight without a place names; it is never there


def trace_graph(component: Component, *, opset: int = 18, cache: Path | None = None) -> ir.Model:
    """Trace a component into a graph whose weights are names, to be placed by `external.place_weights`.

    The graph's arithmetic is that of the weights' type; its inputs and outputs are float32.

    Args:
        opset: one of OPSETS.
        cache: folder where graphs are kept by `content_hash`; an equal one is not traced again.

    Raises:
        ValueError: the opset is none of OPSETS.
    """
    if opset not in OPSETS:
        raise ValueError(f"expected an opset of {OPSETS}, got {opset}")
    kept = None if cache is None else cache / f"{content_hash(component, opset)}.onnx"
    if kept is not None and kept.exists():
        return ir.load(kept)
    model = _trace(component, opset)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
        ir.save(model, temporary)
        temporary.replace(kept)
    return model


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph as one file and check it, and that the weights which it names are there."""
    ir.save(model, path)
    onnx.checker.check_model(path)


def networks_of(component: Component) -> dict[str, nn.Module]:
    """Return the networks that a component wraps (modules with a configuration), by the prefix of their weights."""

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if hasattr(child, "config"):
                yield f"{prefix}{name}.", child
            else:
                yield from walk(f"{prefix}{name}.", child)

    return dict(walk("", component.module))


def content_hash(component: Component, opset: int) -> str:
    """Return the hash of all that a graph is made from: configuration, types, shapes, and who makes it."""
    networks = networks_of(component)
    here = Path(__file__)
    facts = {
        "opset": opset,
        "versions": [
            torch.__version__,
            onnxscript.__version__,
            diffusers.__version__,
            transformers.__version__,
        ],
        "code": [
            here.with_name(name).read_text()
            for name in ("families.py", "fusable.py", "graph.py", "positions.py")
        ],
        "module": [type(part).__qualname__ for part in component.module.modules()],
        "config": {prefix: _config(network) for prefix, network in networks.items()},
        "weights": {
            f"{prefix}{name}": [list(value.shape), str(value.dtype)]
            for prefix, network in networks.items()
            for name, value in network.state_dict().items()
        },
        "inputs": {name: [list(value.shape), str(value.dtype)] for name, value in component.inputs.items()},
        "axes": {name: dict(axes) for name, axes in component.axes.items()},
        "outputs": component.outputs,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _config(network: nn.Module) -> dict[str, Any]:
    config: Any = network.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _trace(component: Component, opset: int) -> ir.Model:
    dynamic = torch.export.Dim.DYNAMIC
    names = {f"{prefix}{name}" for prefix, net in networks_of(component).items() for name in net.state_dict()}
    with exportable(), _quietly(), torch.no_grad():
        program = torch.onnx.export(
            component.module.eval(),
            tuple(component.inputs.values()),
            dynamo=True,
            opset_version=opset,
            optimize=False,
            input_names=list(component.inputs),
            output_names=list(component.outputs),
            dynamic_shapes=tuple(dict.fromkeys(component.axes[name], dynamic) for name in component.inputs),
            verbose=False,
        )
        assert program is not None
        model = program.model
        weights = [value for name, value in model.graph.initializers.items() if name in names]
        for value in weights:
            value.const_value = None  # unknown to every pass, so that none reads or folds it

        def should_fold(node: ir.Node) -> bool | None:
            return False if any(value is not None and value.name in names for value in node.inputs) else None

        optimize_ir(model, should_fold=should_fold)
        model = make_fusable(model)
        ClearMetadataAndDocStringPass()(model)
    for name in names & set(model.graph.initializers):
        value = model.graph.initializers[name]
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(UNPLACED, 0, 0, value.dtype, shape=value.shape, name=name)
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's own remarks (torchvision is missing, weights have no values) off our users' screens."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(noisy, levels, strict=True):
                logger.setLevel(level)
