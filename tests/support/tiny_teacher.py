"""Tiny teacher folders of the demo families, with random weights: what the distiller reads, in a second."""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from flashbulb_distill.teachers.clip_codec import ClipCodec, fit_clip_codec
from flashbulb_distill.teachers.emoji_motion import build_transformer
from flashbulb_distill.teachers.patch_codec import PatchCodec, fit_linear


def make_tiny_teacher(folder: Path, *, seed: int = 0) -> Path:
    """Write transformer/ and codec/ to `folder` and return it."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=64,
        out_channels=64,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=384,
        caption_projection_dim=32,
        pooled_projection_dim=384,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    transformer.save_pretrained(folder / "transformer")
    codec = PatchCodec()
    fit_linear(codec, torch.rand(16, 3, 64, 64) * 2 - 1)
    codec.save_pretrained(folder / "codec")
    return folder


def make_tiny_motion_teacher(folder: Path, *, seed: int = 0) -> Path:
    """Write transformer/ and codec/ of emoji in motion to `folder` and return it."""
    torch.manual_seed(seed)
    transformer = build_transformer(channels=16, num_layers=2, num_heads=2, head_dim=16)
    for parameter in transformer.parameters():
        if not parameter.any():  # an untrained network says nothing
            torch.nn.init.normal_(parameter, std=0.3)
    transformer.save_pretrained(folder / "transformer")
    codec = ClipCodec(16)
    fit_clip_codec(codec, torch.rand(4, 3, 16, 32, 32) * 2 - 1)
    codec.save_pretrained(folder / "codec")
    return folder
