"""The demo families' teachers: a folder with transformer/ and codec/, and the packaged text encoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from diffusers import ModelMixin
from tokenizers import Tokenizer
from torch import nn

from ..bundle import hash_file
from ..errors import MissingFileError
from .codec import freeze
from .denoiser import Condition, Denoiser
from .text import TextEncoder, encode_prompts, load_text_encoder, load_tokenizer

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


def load_demo(
    folder: Path,
    *,
    expected: str,
    example: str,
    network: Callable[..., Network],
    transformer: type[ModelMixin],
    codec: type[Autoencoder],
    latent_shape: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[int, ...]],
    bf16: bool,
    device: torch.device | None,
) -> DemoTeacher[Network, Autoencoder]:
    """Load a teacher folder, frozen, onto a device.

    Args:
        expected, example: what a folder of this family is called, and where one lies; for the error.
        network: (transformer, bf16=) -> what wraps it.
        latent_shape: (transformer's configuration, codec's) -> the latents' shape.
        bf16: compute in bfloat16; the weights stay float32.
    Raises:
        MissingFileError: transformer/ or codec/ is missing.
    """
    for part in ("transformer", "codec"):
        if not (folder / part / "config.json").is_file():
            raise MissingFileError(
                f"{folder}: expected {expected} with {part}/config.json, found none; give a folder like {example}"
            )

    def load_part(kind: Any, part: str) -> Any:
        return kind.from_pretrained(folder, subfolder=part, torch_dtype=torch.float32, local_files_only=True)

    def load(bf16: bool) -> Network:
        return network(load_part(transformer, "transformer"), bf16=bf16)

    denoiser: Any = freeze(load(bf16).to(device))
    autoencoder: Any = freeze(load_part(codec, "codec").to(device))
    return DemoTeacher(
        folder,
        denoiser,
        autoencoder,
        load_text_encoder(),
        load_tokenizer(),
        latent_shape(denoiser.transformer.config, autoencoder.config),
        load,
    )
