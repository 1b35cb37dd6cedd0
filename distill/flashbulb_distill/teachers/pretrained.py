"""A teacher from a diffusers folder at one size: what a run of SDXL, SD3, SD3.5 or CogVideoX distils."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from ..bundle import Shape
from ..errors import UsageError
from .codec import VaeCodec
from .denoiser import Condition, Denoiser
from .embeddings import read_embeddings, write_embeddings
from .load import Source
from .prompts import BATCH_SIZE, PromptEncoder


@dataclass(frozen=True)
class PretrainedTeacher:
    """A teacher of one size on one device; its parts are loaded when they are first needed.

    Text encoders are loaded on the CPU for `encode` and dropped after it: T5 alone is larger than the network.

    Args:
        embeddings: a folder that keeps what was encoded, by the hash of prompts and text encoders; None keeps nothing.
        progress: called with (rows done, rows in all) while prompts are encoded to be kept.
    """

    source: Source
    shape: Shape
    device: torch.device
    embeddings: Path | None = None
    progress: Callable[[int, int], None] = lambda done, total: None

    @cached_property
    def denoiser(self) -> Denoiser:
        """The frozen network."""
        return self.source.denoiser().to(self.device)

    @cached_property
    def codec(self) -> VaeCodec:
        """The frozen VAE."""
        return self.source.codec().to(self.device)

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """The latents' shape without the batch.

        Raises:
            UsageError: the VAE has no latents of that width, height or number of frames, or the network no tokens.
        """
        codec, shape = self.codec, self.shape
        side = codec.downscale * self.source.patch_size  # a token is of whole latents, as they are of pixels
        try:
            codec.latent.model_copy(update={"downscale": side}).check(shape, is_video=codec.is_video)
        except ValueError as error:
            raise UsageError(f"shape: {error}") from None
        return codec.latent_shape(shape.width, shape.height, shape.frames)

    def new_denoiser(self, *, bf16: bool) -> Denoiser:
        """Return a trainable copy of the network, in float32."""
        trainable = replace(self.source, dtype=torch.float32, bf16=bf16)
        return trainable.denoiser().requires_grad_(True).to(self.device)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts on the CPU, where the rows stay: mapped from the disk where they are kept."""
        if self.embeddings is None:
            return self.source.prompts().encode(prompts)
        return self._kept(
            list(prompts), len(prompts), lambda encoder, first: encoder.batches(prompts[first:])
        )

    @cached_property
    def _text_sha256(self) -> dict[str, str]:
        """The hashes of the text encoders, which are gigabytes: read once."""
        return self.source.sha256(*self.source.text_parts)

    def _kept(
        self, what: object, count: int, encode: Callable[[PromptEncoder, int], Iterable[Condition]]
    ) -> Condition:
        """Return the rows of `what`, encoded now from the first that was not encoded before."""
        assert self.embeddings is not None
        made_of = [what, self._text_sha256, str(self.source.dtype)]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        path = self.embeddings / f"{key}.safetensors"
        if not path.is_file():
            self.embeddings.mkdir(parents=True, exist_ok=True)
            parts = partial(encode, self.source.prompts())
            write_embeddings(path, count, parts, batch_size=BATCH_SIZE, progress=self.progress)
        return read_embeddings(path)

    def encode_uncond(self) -> Condition:
        """Return the row that stands for no prompt."""
        if self.embeddings is None:
            return self.source.prompts().encode_uncond()
        return self._kept(None, 1, lambda encoder, first: [encoder.encode_uncond()][first:])

    def sha256(self) -> dict[str, str]:
        """Return the hashes of weights, tokenizers and configurations, by path in the folder."""
        return self.source.sha256()
