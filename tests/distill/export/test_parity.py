"""The parity gate's reference: torch as the graph was traced from it."""

import torch

from flashbulb_distill.export.families import component_of, variants
from flashbulb_distill.export.parity import derive_tolerance
from support.tiny_families import t5


def test_a_network_of_mixed_types_is_compared_as_it_was_traced():
    """transformers keeps T5's wo in float32 beside float16: it was float16 once the tolerance was derived."""
    network = t5(32).eval().requires_grad_(False).half()
    for block in network.encoder.block:
        block.layer[-1].DenseReluDense.wo.float()
    network.register_buffer("scale", torch.ones(1))
    component = component_of("sd3", "text_encoder_3", network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert {tensor.dtype for tensor in before.values()} == {torch.float16, torch.float32}
    derive_tolerance(component.module, variants(component))
    after = network.state_dict()
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
