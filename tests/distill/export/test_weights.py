"""Weights that lie inside a graph as int8 rows compute what they did, and drift is refused."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from flashbulb_distill.export.families import Component
from flashbulb_distill.export.graph import save_graph, trace_graph
from flashbulb_distill.export.parity import ParityError, check_component
from flashbulb_distill.export.weights import hold_inside
from flashbulb_distill.teachers.text import quantise_rows


class Network(torch.nn.Module):
    """An embedding, a matrix product and a Gemm: the weights' three ways into a graph."""

    config = SimpleNamespace(to_dict=dict)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(50, 24)
        self.first, self.second = torch.nn.Linear(24, 32), torch.nn.Linear(32, 16)

    def forward(self, ids):
        return self.second(torch.tanh(self.first(self.table(ids))).mean(1))


class Small(torch.nn.Module):
    """A component: one child with a configuration."""

    def __init__(self):
        super().__init__()
        self.net = Network()

    def forward(self, ids):
        return self.net(ids)


@pytest.fixture
def component():
    module = Small().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim == 2:
            values, scales = quantise_rows(parameter.data)
            parameter.data = values.float() * scales
    ids = torch.arange(15).reshape(3, 5)
    return Component("small", module, {"ids": ids}, {"ids": {0: "batch"}}, ("y",))


def weights(component):
    return {name: value.numpy().copy() for name, value in component.module.state_dict().items()}


def test_int8_rows_lose_nothing_when_the_weights_were_rounded_before(component, tmp_path):
    graph = trace_graph(component)
    hold_inside(graph, weights(component))
    save_graph(graph, tmp_path / "m.onnx")
    cases = [component.inputs, {"ids": component.inputs["ids"][:1]}]
    assert check_component("small", tmp_path / "m.onnx", component.module, cases, 1e-5).error < 2e-6
    stored = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert {t.name: t.data_type for t in stored if t.name.endswith("/int8")} == {
        f"net.{name}.weight/int8": onnx.TensorProto.INT8 for name in ("table", "first", "second")
    }
    assert max(int(np.prod(t.dims)) for t in stored if t.data_type == onnx.TensorProto.FLOAT) <= 50


def test_rows_that_are_no_multiples_of_a_scale_are_refused(component):
    changed = weights(component)
    changed["net.first.weight"][3, 4] += 1e-3
    with pytest.raises(ValueError, match=r"net\.first\.weight: expected rows that are multiples"):
        hold_inside(trace_graph(component), changed)


def test_one_changed_weight_is_refused_by_parity(component, tmp_path):
    graph = trace_graph(component)
    changed = weights(component)
    changed["net.second.bias"][3] += 0.05
    hold_inside(graph, changed)
    save_graph(graph, tmp_path / "bad.onnx")
    with pytest.raises(ParityError, match=r"small: expected ONNX Runtime within 0\.0001"):
        check_component("small", tmp_path / "bad.onnx", component.module, [component.inputs], 1e-4)


def test_rounding_rows_errs_by_half_a_step_at_most():
    weight = torch.randn(7, 50)
    values, scales = quantise_rows(weight)
    assert values.dtype == torch.int8
    assert ((values.float() * scales - weight).abs() <= scales / 2 + 1e-7).all()
