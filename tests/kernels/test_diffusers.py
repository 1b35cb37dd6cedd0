"""Whole diffusers models on our attention: outputs and gradients are those of the models' own processors.

The models are tiny and random, with the flags of the real checkpoints. The truth is the model in fp64 with its own
processors, and the yardstick the error of those processors in fp32.
"""

import copy

import pytest
import torch

from support.attention import judge

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install 'flashbulb[distill]'"
)

from flashbulb_kernels.adapters.diffusers import use_attention  # noqa: E402
from flashbulb_kernels.errors import KernelUnavailable  # noqa: E402


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(model):
    """Give norms weights other than one, and biases other than zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def sdxl():
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=48,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        norm_num_groups=8,
        sample_size=16,
    )
    inputs = {
        "sample": draw(2, 4, 16, 12),
        "timestep": torch.tensor([999.0, 3.0]),
        "encoder_hidden_states": draw(2, 77, 48, seed=1),
        "added_cond_kwargs": {"text_embeds": draw(2, 32, seed=2), "time_ids": draw(2, 6, seed=3)},
    }
    return model, inputs, "sample"


def sd3(**flags):
    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=64,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        **flags,
    )
    inputs = {
        "hidden_states": draw(2, 4, 16, 12),
        "encoder_hidden_states": draw(2, 77, 24, seed=1),
        "pooled_projections": draw(2, 16, seed=2),
        "timestep": torch.tensor([999.0, 3.0]),
    }
    return model, inputs, "hidden_states"


def sd35():
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def cogvideox(rotary=False):
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=24,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=17,
        use_rotary_positional_embeddings=rotary,
    )
    inputs = {
        "hidden_states": draw(2, 3, 4, 8, 12),
        "encoder_hidden_states": draw(2, 17, 24, seed=1),
        "timestep": torch.tensor([999.0, 3.0]),
    }
    if rotary:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(32, ((0, 0), (4, 6)), (4, 6), 3)
    return model, inputs, "hidden_states"


def cogvideox_5b():
    return cogvideox(rotary=True)


FAMILIES = {"sdxl": sdxl, "sd3": sd3, "sd35": sd35, "cogvideox-2b": cogvideox, "cogvideox-5b": cogvideox_5b}


def to(inputs, dtype):
    if isinstance(inputs, torch.Tensor):
        return inputs.to(dtype)
    if isinstance(inputs, tuple):
        return tuple(to(x, dtype) for x in inputs)
    return {name: to(x, dtype) for name, x in inputs.items()}


def run(model, inputs, leaf):
    """Return the output, and the gradients of the noised input and of every norm over a head."""
    inputs = inputs | {leaf: inputs[leaf].clone().requires_grad_()}
    norms = [x for name, x in model.named_parameters() if ".norm_q." in name or ".norm_added_k." in name]
    out = model(**inputs, return_dict=False)[0]
    return out.detach(), *torch.autograd.grad(out.square().sum(), [inputs[leaf], *norms])


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.timeout(120)
def test_model_computes_and_learns_the_same(family, impl):
    torch.manual_seed(0)
    model, inputs, leaf = FAMILIES[family]()
    randomised(model)
    truth = run(copy.deepcopy(model).double(), to(inputs, torch.float64), leaf)
    yardstick = run(model, inputs, leaf)
    assert use_attention(model, impl=impl) == len(model.attn_processors)
    found = run(model, inputs, leaf)
    judge({f"{family} {i}": x for i, x in enumerate(found)}, truth, yardstick, terms=1.0)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sdxl", {"attention"}),
        ("sd3", {"attention"}),
        ("sd35", {"attention_fused"}),
        ("cogvideox-2b", {"attention_fused"}),
        ("cogvideox-5b", {"attention_fused"}),
    ],
)
def test_norms_and_rotations_go_into_the_kernel(family, expected):
    """An adapter that left them to torch would still give right pictures."""
    model, inputs, _ = FAMILIES[family]()
    use_attention(model, impl="reference")
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(**inputs)
    called = {
        event.name.removeprefix("flashbulb::") for event in profile.events() if "flashbulb::" in event.name
    }
    assert called == expected


def test_a_norm_that_the_kernel_does_not_know_is_the_models_own():
    from diffusers.models.normalization import LpNorm

    torch.manual_seed(0)
    model, inputs, leaf = cogvideox_5b()
    for block in model.transformer_blocks:
        block.attn1.norm_q, block.attn1.norm_k = LpNorm(), LpNorm()
    expected = run(model, inputs, leaf)
    use_attention(model, impl="torch")
    torch.testing.assert_close(run(model, inputs, leaf), expected)


def test_switching_twice_takes_the_later_implementation():
    model, _, _ = sd3()
    use_attention(model, impl="triton")
    use_attention(model, impl="torch")
    assert {processor.impl for processor in model.attn_processors.values()} == {"torch"}


def test_a_masked_call_is_the_models_own_or_refused():
    torch.manual_seed(0)
    model, inputs, _ = sdxl()
    masked = inputs | {"encoder_attention_mask": torch.arange(77).repeat(2, 1) < torch.tensor([[5], [70]])}
    expected = model(**masked).sample
    use_attention(model, impl="auto")
    torch.testing.assert_close(model(**masked).sample, expected, rtol=1e-4, atol=1e-5)
    use_attention(model, impl="triton")
    with pytest.raises(KernelUnavailable, match="expected no attention_mask"):
        model(**masked)


def test_other_processors_are_refused_and_nothing_is_switched():
    model, _, _ = sd35()
    model.fuse_qkv_projections()
    before = dict(model.attn_processors)
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn: .* got FusedJointAttnProcessor2_0"):
        use_attention(model)
    assert model.attn_processors == before


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="with attention layers, got Linear"):
        use_attention(torch.nn.Linear(2, 2))
