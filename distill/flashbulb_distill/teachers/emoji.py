"""The demo family: an SD3 transformer on patch latents that predicts x0, and its folder on disk."""

from pathlib import Path
from typing import cast

import torch
from diffusers import SD3Transformer2DModel

from .codec import freeze
from .demo import DemoTeacher, check_folder
from .patch_codec import PatchCodec
from .sd3 import Sd3Denoiser
from .text import load_text_encoder, load_tokenizer

TIMESTEP_SCALE = 1000.0


class EmojiDenoiser(Sd3Denoiser):
    """An SD3Transformer2DModel that predicts x0; computes in bfloat16 where asked to."""

    prediction = "x0"


EmojiTeacher = DemoTeacher[EmojiDenoiser, PatchCodec]


def load_transformer(folder: Path) -> SD3Transformer2DModel:
    """Load a teacher folder's transformer in float32."""
    model = SD3Transformer2DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=torch.float32, local_files_only=True
    )
    return cast(SD3Transformer2DModel, model)


def load_emoji_teacher(
    folder: Path, *, bf16: bool = False, device: torch.device | None = None
) -> EmojiTeacher:
    """Load a teacher of the demo family, frozen, onto a device.

    Raises:
        FileNotFoundError: the folder is not a teacher folder.
    """
    check_folder(folder, "an emoji teacher", "examples/emoji/teacher")
    codec = PatchCodec.from_pretrained(
        folder, subfolder="codec", torch_dtype=torch.float32, local_files_only=True
    )

    def load(bf16: bool) -> EmojiDenoiser:
        return EmojiDenoiser(load_transformer(folder), bf16=bf16)

    denoiser = cast(EmojiDenoiser, freeze(load(bf16).to(device)))
    config = denoiser.transformer.config
    return DemoTeacher(
        folder,
        denoiser,
        cast(PatchCodec, freeze(codec.to(device))),
        load_text_encoder(),
        load_tokenizer(),
        (config.in_channels, config.sample_size, config.sample_size),
        load,
    )
