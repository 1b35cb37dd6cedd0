"""Spellings of GELU and RMS norm: what onnxruntime makes of a graph, and that the numbers do not change."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from flashbulb_distill.export.fusable import make_fusable

WIDTH = 16


class Block(nn.Module):
    """A block as transformers have them: an RMS norm, and GELU in both forms."""

    def __init__(self):
        super().__init__()
        self.norm = RMSNorm(WIDTH, eps=1e-6)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = nn.functional.gelu(self.first(self.norm(x)), approximate="tanh")
        return nn.functional.gelu(self.second(x))


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def traced(block):
    program = torch.onnx.export(
        block,
        (torch.zeros(2, 3, WIDTH),),
        dynamo=True,
        opset_version=18,
        input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        verbose=False,
    )
    return ir.to_proto(program.model).SerializeToString()


def run_and_read(graph, x, folder):
    """Return what a graph computes, and the operators that onnxruntime made of it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    kernels = Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
    return session.run(None, {"x": x})[0], kernels


def rewritten(traced):
    return ir.to_proto(make_fusable(ir.from_proto(onnx.load_from_string(traced)))).SerializeToString()


def test_each_gelu_and_each_rms_norm_becomes_one_kernel(traced, tmp_path):
    x = np.zeros((1, 3, WIDTH), np.float32)
    _, before = run_and_read(traced, x, tmp_path)
    _, after = run_and_read(rewritten(traced), x, tmp_path)
    fused = {"SimplifiedLayerNormalization", "FastGelu", "BiasGelu"}
    assert not fused & before.keys(), (
        "onnxruntime reads torch's spelling: the rewriting serves nothing any more"
    )
    assert {kernel: after[kernel] for kernel in fused} == dict.fromkeys(fused, 1)
    assert not {"Tanh", "Erf", "Pow", "ReduceMean", "Sqrt"} & after.keys()


def test_the_numbers_stay_those_of_torch(block, traced, tmp_path):
    x = np.random.default_rng(0).standard_normal((5, 3, WIDTH)).astype(np.float32) * 3
    found, _ = run_and_read(rewritten(traced), x, tmp_path)
    with torch.no_grad():
        expected = block.double()(torch.from_numpy(x).double()).float().numpy()
    block.float()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("half, one", [(0.25, 1.0), (0.5, 2.0)])
def test_what_only_looks_like_gelu_is_left_alone(half, one):
    graph = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        like (float[n] x) => (float[n] y)
        <float half = {{{half}}}, float one = {{{one}}}>
        {{ t = Tanh(x)  a = Add(t, one)  b = Mul(half, a)  y = Mul(x, b) }}
    """)
    kept = make_fusable(ir.from_proto(graph))
    assert [node.op_type for node in kept.graph] == ["Tanh", "Add", "Mul", "Mul"]
    assert list(kept.graph)[-1].inputs[0].name == "x"
