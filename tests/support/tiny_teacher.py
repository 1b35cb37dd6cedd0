"""A tiny teacher folder of the demo family, with random weights: what the distiller reads, in a second."""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

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
