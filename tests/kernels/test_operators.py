"""The operators under torch's own checks: opcheck, torch.export and torch.compile."""

import pytest
import torch
from torch.library import opcheck

from flashbulb_kernels.attention import attention
from flashbulb_kernels.attention.operators import attention as operator
from flashbulb_kernels.attention.operators import attention_backward
from support.attention import draw, draw_mask

IMPLS = ("triton", "reference")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """The poison of the other tests is not for torch's tracers."""


def leaves(device, **sizes):
    return [x.requires_grad_() for x in draw(device, torch.float32, **sizes)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [False, True])
def test_forward_operator_passes_opcheck(device, impl, masked):
    q, k, v = leaves(device, n=9, m=17, d=32)
    mask = draw_mask(device, 2, 17) if masked else None
    opcheck(operator, (q, k, v, mask, 0.125, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_operator_passes_opcheck_with_transposed_inputs(device, impl):
    k, q, v = leaves(device, n=32, m=32, d=32)
    opcheck(operator, (q.detach().transpose(1, 2).contiguous().transpose(1, 2), k, v, None, 0.125, impl))
    opcheck(operator, (q.detach().mT.requires_grad_(), k, v, None, 0.125, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_operator_passes_opcheck(device, impl):
    q, k, v = draw(device, torch.float32, n=9, m=17, d=32)
    o, lse = operator(q, k, v, None, 0.125, impl)
    arguments = (torch.ones_like(o), torch.zeros_like(lse), q, k, v, o, lse, None, 0.125, impl)
    opcheck(attention_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_attention_has_the_same_gradients(device, impl):
    q, k, v = leaves(device, n=9, m=17, d=32)

    def loss(q, k, v):
        return attention(q, k, v, impl=impl).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_exported_attention_is_one_node_for_every_batch_and_length(device, impl):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, layout="bnhd", impl=impl)

    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    q, k, v = (x.transpose(1, 2) for x in draw(device, torch.float32, n=9, m=17, d=32))
    program = torch.export.export(Model(), (q, k, v), dynamic_shapes=(dynamic,) * 3)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("flashbulb.attention.default") == 1
    other = [x.transpose(1, 2) for x in draw(device, torch.float32, b=3, n=33, m=5, d=32)]
    assert torch.equal(program.module()(*other), Model()(*other))
