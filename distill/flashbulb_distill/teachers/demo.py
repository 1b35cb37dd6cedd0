"""The demo families' teachers: a folder with transformer/ and codec/, and the packaged text encoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from tokenizers import Tokenizer
from torch import nn

from ..bundle import hash_file
from .denoiser import Condition, Denoiser
from .text import TextEncoder, encode_prompts

Network = TypeVar("Network", bound=Denoiser)
Autoencoder = TypeVar("Autoencoder", bound=nn.Module)


@dataclass(frozen=True)
class DemoTeacher(Generic[Network, Autoencoder]):
    """A loaded teacher folder; the text encoder comes from its package.

    Args:
        latent_shape: (channels, height, width), of videos (channels, frames, height, width).
        load: (bf16) -> the folder's network once more, trainable, on the CPU.
    """

    folder: Path
    denoiser: Network
    codec: Autoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    latent_shape: tuple[int, ...]
    load: Callable[[bool], Network]

    def new_denoiser(self, *, bf16: bool) -> Network:
        """Return a trainable copy of the teacher's network."""
        return self.load(bf16).to(self._device)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, any number of them, for the network's device. The text encoder stays on the CPU."""
        return Condition(*encode_prompts(self.text_encoder, self.tokenizer, prompts)).to(self._device)

    def encode_uncond(self) -> Condition:
        """Return the empty prompt's row."""
        return self.encode([""])

    def sha256(self) -> dict[str, str]:
        """Return the hashes of the teacher's weight files, by path in its folder."""
        files = sorted(self.folder.rglob("*.safetensors"))
        return {file.relative_to(self.folder).as_posix(): hash_file(file) for file in files}

    @property
    def _device(self) -> torch.device:
        return next(self.denoiser.parameters()).device


def check_folder(folder: Path, kind: str, example: str) -> None:
    """Refuse what is no teacher folder.

    Raises:
        FileNotFoundError: transformer/ or codec/ is missing.
    """
    for part in ("transformer", "codec"):
        if not (folder / part / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder}: expected {kind} with {part}/config.json, found none; give a folder like {example}"
            )
