"""The plugin for TensorRT, short of a build: graph rewrite, PTX, launch, signatures, the kernel on the interpreter."""

import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flashbulb_kernels.errors import CompilationFailed
from flashbulb_kernels.inspect import tool
from flashbulb_kernels.tensorrt_plugin import (
    NUM_PARAMETERS,
    SHARED_BYTES,
    TACTICS,
    PluginKernel,
    compile_plugin,
    launch_parameters,
    strip_parameters,
    use_plugin,
)

PTX = """
.visible .entry f(
	.param .u64 f_param_0,
	.param .u32 f_param_1,
	.param .u64 f_param_2
)
.reqntid 128
{
	ld.param.b64 	%rd1, [f_param_0];
	ld.param.b32 	%r1, [f_param_1];
	ret;
}
"""


# ------------------------------------------------------------------------------------------------ the graph


def graph(**changes: Any) -> Any:
    """Return a model of one Attention over (2, 3, n, 16), with a mask, attributes or a second output as asked."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'flashbulb[distill]'")
    helper = onnx.helper
    kind = changes.pop("kind", onnx.TensorProto.FLOAT16)
    shapes = {"k": changes.pop("k", [2, 3, "n", 16]), "v": changes.pop("v", [2, 3, "n", 16])}
    inputs = ["q", "k", "v", *changes.pop("inputs", ())]
    outputs = ["y", *changes.pop("outputs", ())]
    attributes = {"scale": 0.25} | changes
    attention = helper.make_node(
        "Attention", inputs, outputs, **{k: v for k, v in attributes.items() if v is not None}
    )
    after = helper.make_node("Identity", outputs[-1:], ["z"])
    values = [
        helper.make_tensor_value_info(name, kind, shapes.get(name, [2, 3, "n", 16]))
        for name in (*inputs, "z")
    ]
    model = helper.make_model(
        helper.make_graph([attention, after], "g", values[:-1], values[-1:]),
        opset_imports=[helper.make_opsetid("", 23)],
    )
    onnx.checker.check_model(model)
    return model


def test_an_attention_becomes_the_plugins_node() -> None:
    import onnx

    model = graph()
    rewrite = use_plugin(model)
    assert (rewrite.replaced, rewrite.left) == (1, ())
    node = model.graph.node[0]
    assert (node.domain, node.op_type) == ("flashbulb", "FlashAttention")
    assert list(node.input) == ["q", "k", "v"] and list(node.output) == ["y"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"scale": 0.25, "plugin_namespace": b"flashbulb", "plugin_version": b"1", "aot": 1}
    onnx.checker.check_model(model)  # a node of a domain that is imported
    assert use_plugin(model).replaced == 0
    assert [known.domain for known in model.opset_import].count("flashbulb") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": ["mask"]}, "has a mask"),
        ({"inputs": ["", "past_k", "past_v"], "outputs": ["present_k", "present_v"]}, "has a past"),
        ({"is_causal": 1}, "is causal"),
        ({"softcap": 30.0}, "caps its scores"),
        ({"q_num_heads": 3, "kv_num_heads": 3}, "packs its heads"),
        ({"outputs": ["", "", "scores"]}, "more outputs"),
        ({"scale": None}, "names no scale"),
        ({"kind": 1}, "is of FLOAT, the plugin of FLOAT16 or BFLOAT16"),
        ({"k": [2, 1, "n", 16], "v": [2, 1, "n", 16]}, "other numbers of heads for q, k and v: 1, 3"),
        ({"v": [2, 3, "n", 8]}, "heads of other widths for q, k and v: 8, 16"),
        ({"k": [2, "h", "n", 16]}, "does not tell heads and width"),
    ],
)
def test_an_attention_that_the_plugin_would_compute_otherwise_stays(
    change: dict[str, Any], reason: str
) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'flashbulb[distill]'")
    if "inputs" in change and "" in change["inputs"]:
        model = graph()
        del model.graph.node[0].input[:]
        model.graph.node[0].input.extend(["q", "k", "v", *change["inputs"]])
    else:
        model = graph(**change)
    before = model.SerializeToString()
    rewrite = use_plugin(model)
    assert rewrite.replaced == 0
    assert len(rewrite.left) == 1 and reason in rewrite.left[0]
    assert model.SerializeToString() == before
    assert onnx.__version__


def test_an_attention_of_values_that_the_graph_does_not_describe_stays() -> None:
    import onnx

    model = graph()
    model.graph.node.insert(0, onnx.helper.make_node("Identity", ["q"], ["q2"]))
    model.graph.node[1].input[0] = "q2"
    assert "does not tell heads and width" in use_plugin(model).left[0]
    model.graph.value_info.append(
        onnx.helper.make_tensor_value_info("q2", onnx.TensorProto.FLOAT16, [2, 3, "n", 16])
    )
    assert use_plugin(model).replaced == 1


def test_what_was_replaced_is_logged_and_that_nothing_was(caplog: pytest.LogCaptureFixture) -> None:
    """Bundles are of opset 18, which has no Attention: an engine was built without the plugin, and nobody was told."""
    caplog.set_level("INFO")
    use_plugin(graph())
    assert caplog.messages == ["g: 1 attention nodes are the plugin's, 0 stay"]
    caplog.clear()
    plain = graph()
    plain.graph.node[0].op_type = "Softmax"
    plain.opset_import[0].version = 18
    use_plugin(plain)
    use_plugin(graph(is_causal=1))
    none, causal = caplog.records
    assert none.levelname == causal.levelname == "WARNING"
    assert "replaced none of 0 in a graph of opset 18: opset 23 has them" in none.message
    assert "replaced none of 1 in a graph of opset 23: y: is causal" in causal.message


# -------------------------------------------------------------------------------------------------- the PTX


def test_parameters_that_are_not_read_are_dropped() -> None:
    stripped = strip_parameters(PTX, "f", 2)
    assert "f_param_1\n)" in stripped and "f_param_2" not in stripped
    assert stripped.replace("f_param_1\n)", "f_param_1,\n\t.param .u64 f_param_2\n)") == PTX


def test_a_parameter_that_is_read_is_never_dropped() -> None:
    with pytest.raises(CompilationFailed, match="reads f_param_1"):
        strip_parameters(PTX, "f", 1)


def test_an_entry_of_too_few_parameters_is_refused() -> None:
    with pytest.raises(CompilationFailed, match="at least 6 parameters, got 3"):
        strip_parameters(PTX, "f", 6)
    with pytest.raises(CompilationFailed, match="at least 1 parameters, got 0"):
        strip_parameters(PTX, "g", 1)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], PluginKernel]:
    """Every tactic on Ampere, and one on what differs most."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'flashbulb[gpu]'")
    cache = tmp_path_factory.mktemp("plugin")
    wanted = [("sm_80", tactic) for tactic in TACTICS] + [("sm_90", 1), ("sm_120", 1)]
    return {(arch, tactic): compile_plugin(arch, "fp16", 64, 0.125, tactic, cache) for arch, tactic in wanted}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_tensorrt_launches_assembles_and_says_the_same_as_its_launch(
    kernels: dict[tuple[str, int], PluginKernel], tmp_path: Path
) -> None:
    for (arch, tactic), kernel in kernels.items():
        entry = re.search(rf"\.entry {kernel.name}\((.*?)\n\)", kernel.ptx, re.DOTALL)
        assert entry is not None and entry[1].count(".param") == NUM_PARAMETERS
        assert kernel.threads == 32 * TACTICS[tactic].num_warps
        assert 0 < kernel.shared_bytes <= SHARED_BYTES
        file = tmp_path / f"{arch}-{tactic}.ptx"
        file.write_text(kernel.ptx, encoding="utf-8")
        target = re.search(r"^\.target (\w+)", kernel.ptx, re.MULTILINE)
        assert target is not None
        assembled = subprocess.run(
            [tool("ptxas-blackwell"), "-v", f"--gpu-name={target[1]}", file, "-o", tmp_path / "k.cubin"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert assembled.returncode == 0, assembled.stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in assembled.stderr, (arch, tactic)


# ----------------------------------------------------------------------------------------------- the launch


class Launch:
    """Stands in for `KernelLaunchParams`: holds what it is given."""


class Expressions:
    """Stands in for `tensorrt.plugin` where a launch is described; sizes are plain integers."""

    KernelLaunchParams = Launch

    @staticmethod
    def cdiv(size: int, by: int) -> int:
        return -(-size // by)


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 24, 4429, 64), (4, 30, 64, 64)])
@pytest.mark.parametrize("tactic", TACTICS)
def test_the_grid_covers_every_query_of_every_head_once(shape: tuple[int, ...], tactic: int) -> None:
    tile = TACTICS[tactic]
    kernel = PluginKernel("f", PTX, shared_bytes=16384, threads=32 * tile.num_warps)
    launch = launch_parameters(Expressions, shape, kernel, tile)
    assert (launch.grid_x - 1) * tile.block_m < shape[2] <= launch.grid_x * tile.block_m
    assert launch.grid_y == shape[0] * shape[1]
    assert (launch.block_x, launch.shared_mem) == (32 * tile.num_warps, 16384)


# ------------------------------------------------------------------------------------------- the signatures

# The decorators of TensorRT 11.4, which check signatures as they decorate, over TensorRT-RTX's base classes. Both come
# as wheels without a GPU; the classes that RTX lacks are empty.
REGISTER = """
import importlib.util, sys, types
import tensorrt_rtx
trt = types.ModuleType("tensorrt")
trt.__dict__.update({name: getattr(tensorrt_rtx, name) for name in dir(tensorrt_rtx) if not name.startswith("__")})
missing = ("IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime", "IPluginV3QuickAOTBuild", "ISymExpr",
           "QuickPluginCreationRequest")
for name in missing:
    if not hasattr(trt, name):
        setattr(trt, name, type(name, (), {}))
sys.modules["tensorrt"] = trt
bindings = importlib.util.find_spec("tensorrt_bindings")
folder = bindings.submodule_search_locations[0] + "/plugin"
spec = importlib.util.spec_from_file_location("tensorrt.plugin", folder + "/__init__.py",
                                              submodule_search_locations=[folder])
trtp = importlib.util.module_from_spec(spec)
sys.modules["tensorrt.plugin"] = trtp
trt.plugin = trtp
spec.loader.exec_module(trtp)
from flashbulb_kernels import tensorrt_plugin
"""
ACCEPTED = """
tensorrt_plugin.register(trt, trtp, "sm_89")
from tensorrt.plugin._lib import QDP_REGISTRY
plugin = QDP_REGISTRY["flashbulb::FlashAttention"]
assert plugin.aot_impl_func is not None and plugin.autotune_func is not None
print("accepted", plugin.aot_impl_attr_names)
"""
REFUSED = """
@trtp.register("flashbulb::Other")
def other(q: trtp.TensorDesc, scale: float) -> trtp.TensorDesc:
    return q.like()
try:
    @trtp.aot_impl("flashbulb::Other")
    def wrong(q: trtp.TensorDesc, scale: int, outputs, tactic: int):
        pass
except ValueError as error:
    print("refused", error)
"""


@pytest.mark.skipif(
    find_spec("tensorrt_bindings") is None or find_spec("tensorrt_rtx") is None,
    reason="tensorrt-cu13-bindings and tensorrt-rtx-cu12 are not installed: they hold the decorators that check",
)
@pytest.mark.parametrize(
    ("code", "answer"), [(ACCEPTED, "accepted ['scale']"), (REFUSED, "refused")], ids=["ours", "a wrong one"]
)
@pytest.mark.timeout(120)
def test_tensorrts_decorators_take_our_signatures(code: str, answer: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    told = subprocess.run(
        [sys.executable, "-c", REGISTER + code], capture_output=True, text=True, env=environment, check=False
    )
    assert answer in told.stdout, told.stderr


# ----------------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize(("nq", "nk", "d"), [(100, 77, 64), (1, 33, 40), (65, 64, 32)], ids=lambda n: str(n))
def test_the_kernel_computes_attention(nq: int, nk: int, d: int) -> None:
    """Against fp64, as far as the rounding of weights and result to fp16 lets it be: half a unit each, 2**-11."""
    triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'flashbulb[gpu]'")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off: set TRITON_INTERPRET=1")
    from flashbulb_kernels.attention.tensorrt import tensorrt_kernel
    from flashbulb_kernels.tiles import block_d

    generator = torch.Generator().manual_seed(nq)
    q, k, v = (torch.randn(2, 3, n, d, generator=generator, dtype=torch.float16) for n in (nq, nk, nk))
    o = torch.full_like(q, math.nan)
    scale = d**-0.5
    grid = (triton.cdiv(nq, 64), 6)
    tensorrt_kernel[grid](
        q, k, v, nq, nk, o, SCALE=scale, D=d, BLOCK_D=block_d(d), BLOCK_M=64, BLOCK_N=32, PRECISION="tf32"
    )
    weights = torch.softmax(q.double() @ k.double().mT * scale, -1)
    exact = weights @ v.double()
    allowed = 2.0**-11 * (exact.abs() + weights @ v.double().abs()) + 2.0**-24
    assert bool(((o.double() - exact).abs() <= allowed).all())
