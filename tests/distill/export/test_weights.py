"""Weights stored beside or inside a graph compute what they did, and drift is refused."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from flashbulb_distill.export.components import export_onnx, save_model
from flashbulb_distill.export.parity import ParityError, check_component
from flashbulb_distill.export.weights import quantise_inside, use_safetensors
from flashbulb_distill.teachers.text import quantise_rows


class Small(torch.nn.Module):
    """A matrix product and a Gemm, so that one weight is folded transposed and the other is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(24, 32), torch.nn.Linear(32, 16)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).mean(1))


@pytest.fixture(scope="module")
def exported():
    module = Small().half().float()
    x = torch.randn(3, 5, 24)
    return module, x, export_onnx(module, {"x": x}, ["y"])


def copy(model):
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    return twin


def run(path, x):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[
        0
    ]


def test_a_graph_over_safetensors_computes_the_same_and_holds_no_matrix(exported, tmp_path):
    module, x, model = exported
    save_file({k: v.half() for k, v in module.state_dict().items()}, tmp_path / "w.safetensors")
    model = copy(model)
    use_safetensors(model, tmp_path, "w.safetensors")
    save_model(model, tmp_path / "m.onnx")
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), module(x).detach().numpy(), atol=1e-6)
    inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert max((int(np.prod(t.dims)) for t in inside), default=0) < 256


def test_weights_that_are_not_the_files_are_refused(exported, tmp_path):
    module, _, model = exported
    save_file({k: v.half() + 1 for k, v in module.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="expected the weights of the graph"):
        use_safetensors(copy(model), tmp_path, "w.safetensors")


def test_int8_rows_lose_nothing_when_the_weights_were_rounded_before(tmp_path):
    module = Small()
    for name, parameter in module.named_parameters():
        if name.endswith("weight"):
            values, scales = quantise_rows(parameter.data)
            parameter.data = values.float() * scales
    x = torch.randn(2, 5, 24)
    model = export_onnx(module, {"x": x}, ["y"])
    before = len(model.SerializeToString())
    quantise_inside(model, {n: p.detach().numpy() for n, p in module.named_parameters() if p.ndim == 2})
    save_model(model, tmp_path / "m.onnx")
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), module(x).detach().numpy(), atol=1e-5)
    assert any(t.data_type == onnx.TensorProto.INT8 for t in model.graph.initializer)
    assert len(model.SerializeToString()) < before


def test_rounding_rows_errs_by_half_a_step_at_most():
    weight = torch.randn(7, 50)
    values, scales = quantise_rows(weight)
    assert values.dtype == torch.int8
    assert ((values.float() * scales - weight).abs() <= scales / 2 + 1e-7).all()


def test_the_parity_gate_passes_the_true_graph_and_refuses_one_changed_weight(exported, tmp_path):
    module, x, model = exported
    save_model(model, tmp_path / "good.onnx")
    assert check_component("small", tmp_path / "good.onnx", module, [{"x": x}], 1e-4).error < 1e-5
    bad = copy(model)
    weight = next(t for t in bad.graph.initializer if np.prod(t.dims) > 256)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[3] += 0.05
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    save_model(bad, tmp_path / "bad.onnx")
    with pytest.raises(ParityError, match=r"small: expected ONNX Runtime within 0\.0001"):
        check_component("small", tmp_path / "bad.onnx", module, [{"x": x}], 1e-4)
