"""Tiny teachers of every family as whole pipelines, with tokenizers and schedulers, as diffusers writes them.

Only widths, depths and sizes differ from the real configurations, so each code path of the real ones is taken.
Where the networks alone are enough, `tiny_families` is quicker.
"""

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

FAMILIES = ("sdxl", "sd3", "sd35-medium", "sd35-large", "cogvideox-2b", "cogvideox-5b")
CLIP_WIDTH, T5_WIDTH = 16, 48  # SD3 pads the CLIP embeddings, 2 x 16 wide, to T5's width


def make_tiny_pipeline(folder: Path, family: str, *, seed: int = 0, **save: Any) -> Path:
    """Write a teacher of the family to `folder` and return it.

    Args:
        save: options of save_pretrained, like max_shard_size.
    """
    pipeline = tiny_pipeline(family, seed=seed)
    pipeline.save_pretrained(folder, **save)
    return folder


def tiny_pipeline(family: str, *, seed: int = 0) -> DiffusionPipeline:
    """Return diffusers' own pipeline of the family, float32, on the CPU, with nothing left at zero."""
    torch.manual_seed(seed)
    if family == "sdxl":
        pipeline: DiffusionPipeline = _sdxl()
    elif family in ("sd3", "sd35-medium", "sd35-large"):
        pipeline = _sd3(family)
    elif family in ("cogvideox-2b", "cogvideox-5b"):
        pipeline = _cogvideox(family)
    else:
        raise ValueError(f"expected one of {FAMILIES}, got {family!r}")
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return CLIP's tokenizer with the letters and a few merges; the end of text has the highest id, as in CLIP."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    merges = [("a", "p"), ("r", "e"), ("re", "d</w>"), ("d", "o"), ("do", "g</w>")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Return T5's tokenizer with the letters and a few words."""
    words = ["<pad>", "</s>", "<unk>", "▁", "▁red", "▁a", "dog", *string.ascii_lowercase]
    scores = [(word, 0.0 if number < 3 else -2.0 - number / 9) for number, word in enumerate(words)]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=226)


def clip_config(vocabulary: int, activation: str) -> CLIPTextConfig:
    """Return a configuration of CLIP's text model; eos_token_id 2 is what the real files say, and means argmax."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=1,
    )


def t5_encoder(vocabulary: int, width: int = T5_WIDTH) -> T5EncoderModel:
    """Return T5 v1.1's encoder."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def image_vae(channels: int, *, sd3: bool) -> AutoencoderKL:
    """Return an image VAE of four levels."""
    options: dict[str, Any] = {"scaling_factor": 0.13025, "force_upcast": True}
    if sd3:
        options = {
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "force_upcast": True,
        }
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=32,
        sample_size=64,
        **options,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    first, second = clip_tokenizer(), clip_tokenizer(pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        cross_attention_dim=2 * CLIP_WIDTH,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_embed_type_num_heads=64,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
        norm_num_groups=32,
        flip_sin_to_cos=True,
        freq_shift=0,
    )
    return StableDiffusionXLPipeline(
        vae=image_vae(4, sd3=False),
        text_encoder=CLIPTextModel(clip_config(len(first), "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(len(second), "gelu")),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon",
            steps_offset=1,
            timestep_spacing="leading",
            interpolation_type="linear",
            use_karras_sigmas=False,
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _sd3(family: str) -> StableDiffusion3Pipeline:
    flags: dict[str, Any] = {"pos_embed_max_size": 192}
    if family == "sd35-medium":
        flags = {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    elif family == "sd35-large":
        flags = {"pos_embed_max_size": 192, "qk_norm": "rms_norm", "dual_attention_layers": ()}
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * CLIP_WIDTH,
        **flags,
    )
    first, second, third = clip_tokenizer(), clip_tokenizer(pad_token="!"), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(16, sd3=True),
        text_encoder=CLIPTextModelWithProjection(clip_config(len(first), "quick_gelu")),
        tokenizer=first,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(len(second), "gelu")),
        tokenizer_2=second,
        text_encoder_3=t5_encoder(len(third)),
        tokenizer_3=third,
    )


def _cogvideox(family: str) -> CogVideoXPipeline:
    big = family == "cogvideox-5b"
    tokenizer = t5_tokenizer()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        time_embed_dim=16,
        text_embed_dim=T5_WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=226,
        spatial_interpolation_scale=1.875,
        temporal_interpolation_scale=1.0,
        use_rotary_positional_embeddings=big,
        attention_bias=True,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=4,
        scaling_factor=0.7 if big else 1.15258426,
        sample_height=64,
        sample_width=64,
    )
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0 if big else 3.0,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(len(tokenizer)),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )
