"""The forward kernel as a plugin of standard TensorRT 11, compiled ahead of time: `flashbulb::FlashAttention`.

Three parts: `compile_plugin` makes PTX that TensorRT can launch, `register` tells TensorRT of it, and `use_plugin` puts
its node into an ONNX graph where an `Attention` stands. An engine with the kernel needs no Python and no Triton to run.

Nothing here has run in TensorRT yet: graph, PTX, launch parameters and signatures are tested, a build is not.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Any

from .aot import Compiled, Variant, compile_variants, default_cache
from .errors import CompilationFailed
from .tiles import Tile

if TYPE_CHECKING:
    import onnx

_log = logging.getLogger(__name__)

NAMESPACE = "flashbulb"
OPERATOR = "FlashAttention"
DTYPES = ("FLOAT16", "BFLOAT16")  # as ONNX calls them

# TensorRT times these at build and keeps the fastest. They fit the shared memory that needs no leave of the driver.
TACTICS: dict[int, Tile] = {
    1: Tile(block_m=64, block_n=64, num_warps=4, num_stages=2),
    2: Tile(block_m=64, block_n=32, num_warps=4, num_stages=2),
    3: Tile(block_m=128, block_n=32, num_warps=8, num_stages=2),
}
SHARED_BYTES = 48 * 1024
# p_q, p_k, p_v, NQ, NK, p_o: what TensorRT passes.
NUM_PARAMETERS = 6


@dataclass(frozen=True, slots=True)
class PluginKernel:
    """What TensorRT needs to launch: the function's name in the PTX, shared memory per block, threads per block."""

    name: str
    ptx: str
    shared_bytes: int
    threads: int


def compile_plugin(
    arch: str, dtype: str, head_dim: int, scale: float, tactic: int, cache: Path | None = None
) -> PluginKernel:
    """Compile the kernel for TensorRT.

    Args:
        arch: like "sm_89".   dtype: "fp16" or "bf16".   scale: of the scores, before softmax.
        tactic: a key of TACTICS.
    Raises:
        CompilationFailed: it does not compile, needs scratch memory, or more shared memory than a plugin may use.
    """
    variant = Variant(
        "tensorrt", "plain", dtype, head_dim, arch, TACTICS[tactic], constants=(("SCALE", float(scale)),)
    )
    ((_, result),) = compile_variants([variant], cache or default_cache(), jobs=1)
    if isinstance(result, CompilationFailed):
        raise result
    return plugin_kernel(result)


def plugin_kernel(compiled: Compiled) -> PluginKernel:
    """Make TensorRT's kernel of a compiled one; raises as compile_plugin."""
    name, metadata = compiled.metadata["name"], compiled.metadata
    if metadata["global_scratch_size"] or metadata["profile_scratch_size"]:
        raise CompilationFailed(f"{compiled.variant}: needs scratch memory, which TensorRT does not pass")
    if metadata["shared"] > SHARED_BYTES:
        raise CompilationFailed(
            f"{compiled.variant}: expected at most {SHARED_BYTES} bytes of shared memory for a plugin, "
            f"got {metadata['shared']}; choose a smaller tile"
        )
    ptx = strip_parameters(compiled.ptx, name, NUM_PARAMETERS)
    threads = required_threads(ptx)
    if threads != 32 * metadata["num_warps"]:
        raise CompilationFailed(
            f"{compiled.variant}: expected {32 * metadata['num_warps']} threads, PTX says {threads}"
        )
    return PluginKernel(name, ptx, metadata["shared"], threads)


def strip_parameters(ptx: str, name: str, keep: int) -> str:
    """Drop all but the first `keep` parameters of an entry: Triton adds two pointers to scratch memory.

    Raises:
        CompilationFailed: the entry has fewer parameters, or its code reads one that would be dropped.
    """
    found = re.search(rf"(\.entry\s+{re.escape(name)}\s*\()(.*?)(\n?\))", ptx, re.DOTALL)
    parameters = [] if found is None else [part for part in found[2].split(",") if part.strip()]
    if found is None or len(parameters) < keep:
        raise CompilationFailed(
            f"{name}: expected an entry of at least {keep} parameters, got {len(parameters)}"
        )
    body = ptx[found.end() :]
    for parameter in parameters[keep:]:
        label = parameter.split("//")[0].split()[-1]
        if re.search(rf"\b{re.escape(label)}\b", body):
            raise CompilationFailed(f"{name}: reads {label}, which TensorRT does not pass")
    return ptx[: found.start()] + found[1] + ",".join(parameters[:keep]) + found[3] + body


def required_threads(ptx: str) -> int:
    """Return the block size that the PTX insists on.

    Raises:
        CompilationFailed: it names none.
    """
    found = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1)*", ptx)
    if found is None:
        raise CompilationFailed("expected .reqntid in the PTX, found none")
    return int(found[1])


# ------------------------------------------------------------------------------------------------ TensorRT


def register(trt: Any, trtp: Any, arch: str, cache: Path | None = None) -> None:
    """Make the plugin known to TensorRT in this process; call it once, before a network is parsed.

    Args:
        trt, trtp: the modules `tensorrt` and `tensorrt.plugin`.
        arch: of the GPU that builds, like "sm_89".
    """
    # TensorRT checks the annotations as it decorates; its classes exist only where it is installed.
    desc = trtp.TensorDesc
    written = GenericAlias(tuple, (desc,))
    dtypes = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}

    def flash_attention(q, k, v, scale):  # type: ignore[no-untyped-def]
        return q.like()

    flash_attention.__annotations__ = {"q": desc, "k": desc, "v": desc, "scale": float, "return": desc}

    def combinations(q, k, v, scale, outputs):  # type: ignore[no-untyped-def]
        combination = trtp.AutoTuneCombination()
        combination.pos([0, 1, 2, 3], "FP16|BF16")
        combination.tactics(list(TACTICS))
        return [combination]

    combinations.__annotations__ = {
        "q": desc, "k": desc, "v": desc, "scale": float, "outputs": written,
        "return": list[trtp.AutoTuneCombination],
    }  # fmt: skip

    def compiled(q, k, v, scale, outputs, tactic):  # type: ignore[no-untyped-def]
        kernel = compile_plugin(arch, dtypes[q.dtype], int(q.shape[3]), scale, tactic, cache)
        launch = launch_parameters(trtp, q.shape_expr, kernel, TACTICS[tactic])
        sizes = trtp.SymIntExprs.from_tuple(
            [trtp.SymInt32(size) for size in (q.shape_expr[2], k.shape_expr[2])]
        )
        return kernel.name, kernel.ptx, launch, sizes

    compiled.__annotations__ = {
        "q": desc, "k": desc, "v": desc, "scale": float, "outputs": written, "tactic": int,
        "return": tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs],
    }  # fmt: skip

    name = f"{NAMESPACE}::{OPERATOR}"
    trtp.register(name)(flash_attention)
    trtp.autotune(name)(combinations)
    trtp.aot_impl(name)(compiled)


def launch_parameters(trtp: Any, shape: Any, kernel: PluginKernel, tile: Tile) -> Any:
    """Return the launch as expressions of q's symbolic shape (B, H, NQ, D), valid for every size in a profile."""
    launch = trtp.KernelLaunchParams()
    launch.grid_x = trtp.cdiv(shape[2], tile.block_m)
    launch.grid_y = shape[0] * shape[1]
    launch.block_x = kernel.threads
    launch.shared_mem = kernel.shared_bytes
    return launch


# ---------------------------------------------------------------------------------------------------- ONNX


@dataclass(frozen=True, slots=True)
class Rewrite:
    """How many nodes became the plugin's, and why the others did not, a line each."""

    replaced: int
    left: tuple[str, ...]


def use_plugin(model: "onnx.ModelProto") -> Rewrite:
    """Replace, in place, every `Attention` that the plugin computes alike; for a copy that only TensorRT reads.

    An `Attention` with a mask, a past, a cap, causal order, packed heads or a second output stays as it is; so does one
    whose q, k and v are not of fp16 or bf16, differ in heads or width, or are not described in the graph. How many were
    replaced is logged, a warning where none was.
    """
    from onnx import helper

    graph = model.graph
    described = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info)}

    wanted = {name for node in model.graph.node for name in node.input}
    wanted |= {output.name for output in model.graph.output}
    replaced, left = 0, []
    for node in model.graph.node:
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        reason = _why_not(list(node.input), list(node.output), attributes, wanted)
        if (reason := reason or _why_not_these([described.get(name) for name in node.input[:3]])) is not None:
            left.append(f"{node.name or node.output[0]}: {reason}")
            continue
        node.op_type, node.domain = OPERATOR, NAMESPACE
        del node.attribute[:], node.input[3:], node.output[1:]
        node.attribute.extend(
            [
                helper.make_attribute("scale", float(attributes["scale"])),
                helper.make_attribute("plugin_namespace", NAMESPACE),
                helper.make_attribute("plugin_version", "1"),
                helper.make_attribute("aot", 1),
            ]
        )
        replaced += 1
    if replaced and all(known.domain != NAMESPACE for known in model.opset_import):
        model.opset_import.append(helper.make_opsetid(NAMESPACE, 1))
    if replaced:
        _log.info("%s: %d attention nodes are the plugin's, %d stay", graph.name, replaced, len(left))
    else:
        opset = next((known.version for known in model.opset_import if known.domain in ("", "ai.onnx")), 0)
        _log.warning(
            "%s: expected Attention nodes for the plugin, replaced none of %d in a graph of opset %d: %s",
            graph.name,
            len(left),
            opset,
            "; ".join(left) or "opset 23 has them, an older one holds attention in pieces",
        )
    return Rewrite(replaced, tuple(left))


def _why_not(
    inputs: list[str], outputs: list[str], attributes: dict[str, Any], wanted: set[str]
) -> str | None:
    """Say why the plugin cannot stand in for an Attention; None where it can."""
    if any(inputs[3:4]):
        return "has a mask"
    if any(inputs[4:]):
        return "has a past or lengths of keys"
    if attributes.get("is_causal", 0):
        return "is causal"
    if attributes.get("softcap", 0.0):
        return "caps its scores"
    if attributes.get("q_num_heads", 0) or attributes.get("kv_num_heads", 0):
        return "packs its heads into 3 axes"
    if any(name in wanted for name in outputs[1:] if name):
        return "has more outputs than one"
    if "scale" not in attributes:
        return "names no scale"
    return None


def _why_not_these(tensors: "list[onnx.TypeProto.Tensor | None]") -> str | None:
    """Say why the plugin cannot take these q, k and v; None where it can."""
    from onnx import TensorProto

    heads, widths, types = set(), set(), set()
    for tensor in tensors:
        axes = [] if tensor is None else list(tensor.shape.dim)
        if tensor is None or len(axes) != 4 or not (axes[1].dim_value and axes[3].dim_value):
            return "does not tell heads and width of q, k and v"
        heads.add(axes[1].dim_value)
        widths.add(axes[3].dim_value)
        types.add(TensorProto.DataType.Name(tensor.elem_type))
    if len(types) > 1 or not types <= {*DTYPES}:
        return f"is of {' and '.join(sorted(types))}, the plugin of {' or '.join(DTYPES)}"
    if len(heads) > 1:
        return f"has other numbers of heads for q, k and v: {', '.join(map(str, sorted(heads)))}"
    if len(widths) > 1:
        return f"has heads of other widths for q, k and v: {', '.join(map(str, sorted(widths)))}"
    return None
