"""Engines of TensorRT from a bundle's graphs.

rtx        TensorRT for RTX: an engine is built on any machine, with no GPU, for a list of compute capabilities;
           the driver finishes it when it is first loaded.
standard   TensorRT 11: an engine is tuned on the GPU at hand, and runs on that model of GPU alone.

Both are strongly typed: the precision is what the graph says. The graph itself is never changed on disk; what a
flavour needs changed (`rewrite`) is changed in the copy in memory that its parser reads.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..bundle import Bundle, BundleError, hash_file, open_bundle
from ..bundle.engines import (
    Engine,
    EngineManifest,
    Flavor,
    Profile,
    engine_folder,
    read_engine_manifest,
    write_engine_manifest,
)
from .draft import draft
from .profiles import Bucket, make_profile

MODULES: dict[Flavor, tuple[str, str]] = {
    "rtx": ("tensorrt_rtx", "tensorrt-rtx"),
    "standard": ("tensorrt", "tensorrt"),
}
TIMING_CACHE = "timing.cache"

Rewrite = Callable[[onnx.ModelProto], None]
OnEngine = Callable[[str, Engine], None]


class EngineError(ValueError):
    """Say which component could not become an engine, and why."""


class TargetError(EngineError):
    """Say which GPUs an engine can be built for here."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU at hand, as CUDA calls it."""

    name: str
    capability: str  # such as sm_90


def load_runtime(flavor: Flavor) -> Any:
    """Import the Python module of a flavour.

    Raises:
        EngineError: it is not installed, or cannot be loaded here.
    """
    module, extra = MODULES[flavor]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EngineError(
            f"expected the package {module} for --flavor {flavor}, got {error}; run: pip install 'flashbulb[{extra}]'"
        ) from error


def check_targets(trt: Any, flavor: Flavor, targets: tuple[str, ...], gpu: Gpu | None) -> tuple[str, ...]:
    """Return the targets in order, each once, if the flavour can build for them.

    Raises:
        TargetError: a target that TensorRT-RTX does not know, or that is not the GPU at hand.
    """
    if flavor == "standard":
        if gpu is None:
            raise TargetError(
                "expected a GPU: standard engines are tuned on the GPU that they will run on; "
                "run this there, or use --flavor rtx"
            )
        if targets not in ((), (gpu.capability,)):
            raise TargetError(
                f"expected --target {gpu.capability}, the GPU at hand ({gpu.name}), got {', '.join(targets)}"
            )
        return (gpu.capability,)
    known = {
        f"sm_{name[2:]}"
        for name in dir(trt.ComputeCapability)
        if name.startswith("SM") and name[2:].isdigit()
    }
    ordered = tuple(sorted(set(targets), key=lambda target: (len(target), target)))
    if not ordered or not set(ordered) <= known:
        raise TargetError(
            f"--target: expected a list of {', '.join(sorted(known, key=lambda t: (len(t), t)))}, "
            f"got {', '.join(targets) or 'none'}"
        )
    return ordered


def build_engines(
    bundle: Bundle,
    flavor: Flavor,
    targets: tuple[str, ...],
    *,
    gpu: Gpu | None = None,
    max_batch: int | None = None,
    rewrite: Rewrite | None = None,
    on_engine: OnEngine | None = None,
    trt: Any = None,
) -> Path:
    """Build an engine of every component into the bundle's engines/<target>/, which appears whole or not at all.

    Args:
        targets: compute capabilities such as sm_89; () is the GPU at hand, for the standard flavour.
        max_batch: of the engines; the bundle's own if None.
        rewrite: changes the graph in memory before it is parsed, such as attention into our plugin.
        on_engine: told of each engine when it is there.
        trt: the runtime's module; imported if None.
    Raises:
        EngineError: a component cannot become an engine; unsupported operators are named.
        FileExistsError: such engines are there.
    """
    trt = load_runtime(flavor) if trt is None else trt
    targets = check_targets(trt, flavor, targets, gpu)
    gpu_name = gpu.name if flavor == "standard" and gpu is not None else None
    folder = engine_folder(bundle.path, flavor, targets, trt.__version__, gpu_name)
    if folder.exists():
        raise FileExistsError(
            f"{folder}: expected new engines, but they exist; remove the folder to build again"
        )
    manifest = bundle.manifest
    batch = max_batch or manifest.max_batch
    buckets = []
    for shape in manifest.shapes:
        *frames, height, width = manifest.latent_shape(shape.width, shape.height, shape.frames)[1:]
        text = tuple(one.max_length for one in manifest.text)
        buckets.append(Bucket(height, width, text, frames=frames[0] if frames else 1))
    folder.parent.mkdir(exist_ok=True)
    with draft(folder) as work:
        engines = {}
        cache = folder.parent / f"{flavor}-{trt.__version__}-{TIMING_CACHE}" if flavor == "standard" else None
        for component, name in sorted(manifest.components.model_dump().items()):
            started = time.perf_counter()
            plan, profiles = build_engine(
                trt,
                bundle.file(name),
                buckets,
                batch,
                targets=targets if flavor == "rtx" else (),
                timing_cache=cache,
                rewrite=rewrite,
            )
            path = work / f"{component}.engine"
            path.write_bytes(plan)
            engines[component] = Engine(
                file=path.name,
                sha256=hash_file(path),
                bytes=path.stat().st_size,
                graph=manifest.files[name].sha256,
                profiles=tuple(profiles),
                build_s=round(time.perf_counter() - started, 1),
            )
            if on_engine is not None:
                on_engine(component, engines[component])
        written = EngineManifest(
            schema_version=1,
            flavor=flavor,
            runtime_version=trt.__version__,
            targets=targets,
            gpu=gpu_name,
            bundle_sha256=bundle.sha256,
            shapes=tuple((s.width, s.height) for s in manifest.shapes),
            max_batch=batch,
            engines=engines,
        )
        write_engine_manifest(work, written)
        read_engine_manifest(work)
    return folder


def build_engine(
    trt: Any,
    graph: Path,
    buckets: list[Bucket],
    max_batch: int,
    *,
    targets: tuple[str, ...] = (),
    timing_cache: Path | None = None,
    rewrite: Rewrite | None = None,
) -> tuple[bytes, list[dict[str, Profile]]]:
    """Build one engine with a profile per bucket; return its bytes and the profiles.

    Args:
        targets: compute capabilities to build for with no GPU; () builds for the GPU at hand.
        timing_cache: file of measured tactics, read if it is there and written back.
    Raises:
        EngineError: the parser or the builder refused; unsupported operators are named.
    """
    model = onnx.load(graph, load_external_data=False)
    make_decomposable(model)
    widen_int8(model)
    if rewrite is not None:
        rewrite(model)
    logger = _collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString(), path=str(graph)):
        raise EngineError(
            f"{graph}: TensorRT {trt.__version__} cannot read it: {'; '.join(_parse_errors(parser))}"
        )
    config = builder.create_builder_config()
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.replace("sm_", "SM")), index)
    inputs = graph_inputs(model)
    profiles = []
    for bucket in buckets:
        profile = make_profile(inputs, bucket, max_batch)
        if profile in profiles:  # a text encoder is the same for all picture sizes
            continue
        profiles.append(profile)
        added = builder.create_optimization_profile()
        for name, shape in profile.items():
            added.set_shape(name, shape.smallest, shape.usual, shape.largest)
        config.add_optimization_profile(added)
    if timing_cache is not None:
        known = timing_cache.read_bytes() if timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"{graph}: TensorRT {trt.__version__} built nothing: {'; '.join(logger.errors[-3:])}"
        )
    if timing_cache is not None:
        timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan), profiles


def make_decomposable(model: onnx.ModelProto) -> None:
    """Let TensorRT split ONNX attention (opset 23) where it has no kernel of its own for a dtype or head size.

    onnxruntime refuses this attribute, so it goes into the copy in memory alone.
    """
    for node in model.graph.node:
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))


def widen_int8(model: onnx.ModelProto) -> None:
    """Hold int8 weights as float16, which has all their values: TensorRT takes int8 for its own quantisation only."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def graph_inputs(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Return the shape of every input of a graph, None where an axis is dynamic."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
        if value.name not in weights
    }


def _parse_errors(parser: Any) -> Iterator[str]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        operator = error.node_operator() if hasattr(error, "node_operator") else ""
        node = error.node_name() if hasattr(error, "node_name") else ""
        yield f"operator {operator} (node {node}): {error.desc()}" if operator else error.desc()


def _collecting_logger(trt: Any) -> Any:
    """Return a TensorRT logger that keeps errors for the one message that we raise."""

    class Collecting(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Collecting()


def gpu_at_hand() -> Gpu | None:
    """Return the first CUDA device, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return Gpu(torch.cuda.get_device_name(0), f"sm_{major}{minor}")


def open_for_engines(path: Path) -> Bundle:
    """Open a bundle whose every byte is checked: an engine is only as true as the graph that it came from.

    Raises:
        BundleError: as `open_bundle`.
    """
    bundle = open_bundle(path)
    if not bundle.manifest.parity.get("passed", False):
        raise BundleError(
            f"{path}: expected graphs that passed the parity gate, the manifest has no such verdict"
        )
    return bundle


__all__ = [
    "EngineError",
    "Gpu",
    "TargetError",
    "build_engine",
    "build_engines",
    "check_targets",
    "gpu_at_hand",
    "graph_inputs",
    "load_runtime",
    "make_decomposable",
    "open_for_engines",
    "widen_int8",
]
