"""The demo family: an SD3 transformer on patch latents that predicts x0, and its folder on disk."""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from .demo import DemoTeacher, load_demo
from .patch_codec import PatchCodec
from .sd3 import Sd3Denoiser

TIMESTEP_SCALE = 1000.0


class EmojiDenoiser(Sd3Denoiser):
    """An SD3Transformer2DModel that predicts x0; computes in bfloat16 where asked to."""

    prediction = "x0"


EmojiTeacher = DemoTeacher[EmojiDenoiser, PatchCodec]


def load_emoji_teacher(
    folder: Path, *, bf16: bool = False, device: torch.device | None = None
) -> EmojiTeacher:
    """Load a teacher of the demo family, frozen, onto a device; see `load_demo`."""
    return load_demo(
        folder,
        expected="an emoji teacher",
        example="examples/emoji/teacher",
        network=EmojiDenoiser,
        transformer=SD3Transformer2DModel,
        codec=PatchCodec,
        latent_shape=lambda network, _: (
            network["in_channels"],
            network["sample_size"],
            network["sample_size"],
        ),
        bf16=bf16,
        device=device,
    )
