"""Tiny random models of the families that people own, with every configuration flag of the real checkpoints.

Widths, depths and vocabularies are tiny; everything that changes what is computed (activations, normalisations,
embeddings, projections, scaling) is that of SDXL 1.0, SD3 Medium, SD3.5, CogVideoX-2B and CogVideoX-5B.
"""

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXTransformer3DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

CLIP_LENGTH, T5_LENGTH, VOCABULARY = 77, 16, 99
FAMILIES = ("sdxl", "sd3", "sd35", "cogvideox-2b", "cogvideox-5b")


def make_tiny_family(family: str, *, seed: int = 0) -> dict[str, nn.Module]:
    """Return the tiny components of a family, by the names that its diffusers pipeline gives them."""
    torch.manual_seed(seed)
    parts = {name: make().eval().requires_grad_(False) for name, make in _MAKERS[family].items()}
    for part in parts.values():
        _shake(part)
    return parts


def _shake(module: nn.Module) -> None:
    """Move weights that start at zero or one, so that no layer is left out of what is compared."""
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or not parameter.any():
            generator = torch.Generator().manual_seed(len(name))
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def clip(*, projected: bool, activation: str, width: int) -> nn.Module:
    """Return a CLIP text model: SDXL's and SD3's first has quick_gelu, their second gelu and a projection."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act=activation,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5(width: int) -> nn.Module:
    """Return a T5 1.1 encoder, as SD3 and CogVideoX use XXL."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu_new",
        is_gated_act=True,
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def sdxl_unet() -> nn.Module:
    """Return SDXL's UNet: epsilon, sizes as extra conditions, linear projections, deepest at the bottom."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        center_input_sample=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        only_cross_attention=False,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        downsample_padding=1,
        act_fn="silu",
        norm_num_groups=8,
        norm_eps=1e-5,
        cross_attention_dim=48,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        time_embedding_type="positional",
        resnet_time_scale_shift="default",
        upcast_attention=None,
    )


def sd3_transformer(*, large: bool) -> nn.Module:
    """Return SD3 Medium's transformer, or SD3.5's: qk-norm, and dual attention as in 3.5 Medium."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=16,
        pooled_projection_dim=24 + 24,
        pos_embed_max_size=24,
        qk_norm="rms_norm" if large else None,
        dual_attention_layers=(0,) if large else (),
    )


def cogvideox_transformer(*, rotary: bool) -> nn.Module:
    """Return CogVideoX's transformer: 5B has rotary positions, 2B added ones."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        flip_sin_to_cos=True,
        freq_shift=0,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=2,
        dropout=0.0,
        attention_bias=True,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=T5_LENGTH,
        activation_fn="gelu-approximate",
        timestep_activation_fn="silu",
        norm_elementwise_affine=True,
        norm_eps=1e-5,
        spatial_interpolation_scale=1.875,
        temporal_interpolation_scale=1.0,
        use_rotary_positional_embeddings=rotary,
        use_learned_positional_embeddings=False,
    )


def image_vae(*, channels: int, scaling: float, shift: float | None, quant_conv: bool) -> nn.Module:
    """Return an AutoencoderKL: SDXL's, or SD3's with 16 channels, a shift and no quantisation layers."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        act_fn="silu",
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling,
        shift_factor=shift,
        force_upcast=True,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        mid_block_add_attention=True,
    )


def video_vae(scaling: float) -> nn.Module:
    """Return CogVideoX's causal VAE: frames in groups, time compressed by four."""
    return AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        act_fn="silu",
        latent_channels=4,
        norm_eps=1e-6,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=64,
        sample_width=64,
        scaling_factor=scaling,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


_SDXL_TEXT: dict[str, Callable[[], nn.Module]] = {
    "text_encoder": lambda: clip(projected=False, activation="quick_gelu", width=24),
    "text_encoder_2": lambda: clip(projected=True, activation="gelu", width=24),
}
_SD3_TEXT: dict[str, Callable[[], nn.Module]] = {
    "text_encoder": lambda: clip(projected=True, activation="quick_gelu", width=24),
    "text_encoder_2": lambda: clip(projected=True, activation="gelu", width=24),
    "text_encoder_3": lambda: t5(64),
}
_MAKERS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "sdxl": _SDXL_TEXT
    | {
        "unet": sdxl_unet,
        "vae": lambda: image_vae(channels=4, scaling=0.13025, shift=None, quant_conv=True),
    },
    "sd3": _SD3_TEXT
    | {
        "transformer": lambda: sd3_transformer(large=False),
        "vae": lambda: image_vae(channels=16, scaling=1.5305, shift=0.0609, quant_conv=False),
    },
    "sd35": _SD3_TEXT
    | {
        "transformer": lambda: sd3_transformer(large=True),
        "vae": lambda: image_vae(channels=16, scaling=1.5305, shift=0.0609, quant_conv=False),
    },
    "cogvideox-2b": {
        "text_encoder": lambda: t5(32),
        "transformer": lambda: cogvideox_transformer(rotary=False),
        "vae": lambda: video_vae(1.15258426),
    },
    "cogvideox-5b": {
        "text_encoder": lambda: t5(32),
        "transformer": lambda: cogvideox_transformer(rotary=True),
        "vae": lambda: video_vae(0.7),
    },
}
