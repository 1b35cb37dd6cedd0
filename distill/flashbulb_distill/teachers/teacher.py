"""What a run needs of a teacher of any family: its network and decoder, embeddings of prompts, copies to train."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .denoiser import Condition, Denoiser


class Codec(Protocol):
    """Latents to pixels."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels, about [-1, 1] and not clamped; gradients pass through."""
        ...


class Teacher(Protocol):
    """A frozen teacher on one device."""

    @property
    def denoiser(self) -> Denoiser:
        """The frozen network."""
        ...

    @property
    def codec(self) -> Codec:
        """The frozen decoder."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of the latents, (channels, frames, height, width) of a video's."""
        ...

    def new_denoiser(self, *, bf16: bool) -> Denoiser:
        """Return a trainable float32 copy of the network, on its device."""
        ...

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts, any number of them. Text encoders never stay on the network's device."""
        ...

    def encode_uncond(self) -> Condition:
        """Return the one row that stands for no prompt."""
        ...

    def sha256(self) -> dict[str, str]:
        """Return the hashes of all that decides what the teacher draws, by path in its folder."""
        ...
