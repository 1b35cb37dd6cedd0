"""The demo family: an SD3 transformer on patch latents that predicts x0, and its folder on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import SD3Transformer2DModel
from tokenizers import Tokenizer

from ..bundle import hash_file
from .denoiser import Condition
from .patch_codec import PatchCodec
from .sd3 import Sd3Denoiser
from .text import TextEncoder, encode_prompts, load_text_encoder, load_tokenizer

TIMESTEP_SCALE = 1000.0


class EmojiDenoiser(Sd3Denoiser):
    """An SD3Transformer2DModel that predicts x0; computes in bfloat16 where asked to."""

    prediction = "x0"

    @property
    def width(self) -> int:
        """Return the number of channels of a block's features."""
        return self.widths[0]


@dataclass(frozen=True)
class EmojiTeacher:
    """A loaded teacher folder: transformer/ and codec/ as diffusers writes them, text encoder from its package."""

    folder: Path
    denoiser: EmojiDenoiser
    codec: PatchCodec
    text_encoder: TextEncoder
    tokenizer: Tokenizer

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents."""
        config = self.denoiser.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    def new_denoiser(self, *, bf16: bool) -> EmojiDenoiser:
        """Return a trainable copy of the teacher's network."""
        copy = EmojiDenoiser(load_transformer(self.folder), bf16=bf16)
        return copy.to(next(self.denoiser.parameters()).device)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, any number of them, for the network's device. The text encoder stays on the CPU."""
        device = next(self.denoiser.parameters()).device
        tokens, pooled = encode_prompts(self.text_encoder, self.tokenizer, prompts)
        return Condition(tokens.to(device), pooled.to(device))

    def sha256(self) -> dict[str, str]:
        """Return the hashes of the teacher's weight files, by path in its folder."""
        files = sorted(self.folder.rglob("*.safetensors"))
        return {file.relative_to(self.folder).as_posix(): hash_file(file) for file in files}


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
    for part in ("transformer", "codec"):
        if not (folder / part / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder}: expected an emoji teacher with {part}/config.json, found none; "
                "give a folder like examples/emoji/teacher"
            )
    denoiser = EmojiDenoiser(load_transformer(folder), bf16=bf16)
    codec = PatchCodec.from_pretrained(
        folder, subfolder="codec", torch_dtype=torch.float32, local_files_only=True
    )
    denoiser.requires_grad_(False).eval().to(device)
    codec.requires_grad_(False).eval().to(device)
    return EmojiTeacher(folder, denoiser, cast(PatchCodec, codec), load_text_encoder(), load_tokenizer())
