"""What runs a batch: chosen by name, never replaced silently by another one.

A backend has one method per stage, so that a worker can overlap them; `generate` runs them one after another.

    prompts ──encode_prompts──► embeddings ──denoise (noise from seed and index)──► latents ──decode──► pictures
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import numpy as np

from flashbulb_distill.bundle import Bundle
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.errors import OutOfMemory

LONG_PROMPT = "word " * 600  # longer than any text encoder reads, which is 512 tokens at most
OnStep = Callable[[int, int, np.ndarray], None]
"""Called on the device's thread after each step with (step from 0, num_steps, x0 latents); may raise to stop."""


@dataclass(frozen=True)
class ImageRequest:
    """One picture or video to make: what the model needs to know, and nothing of queues or HTTP."""

    prompt: str
    seed: int
    index: int  # which image of its request; the noise is drawn from (seed, index)
    width: int
    height: int
    num_steps: int | None = None  # None: the student's own
    frames: int = 1  # of a video


@dataclass(frozen=True)
class Embeddings:
    """Encoded prompts, one row per prompt."""

    tokens: np.ndarray  # [b, l, d]
    pooled: np.ndarray  # [b, d]


class Backend(Protocol):
    """Runs the stages of one collated batch. Knows nothing of queues, HTTP or batching.

    Different stages may be called from different threads at the same time, one stage never twice.
    """

    name: str  # as it is chosen by

    def load(self, bundle: Bundle) -> None:
        """Open a verified bundle; nothing is run yet."""
        ...

    def encode_prompts(self, prompts: Sequence[str], pad_to: int | None = None) -> Embeddings:
        """Encode prompts, in their order; with `pad_to`, in text batches of exactly that size."""
        ...

    def denoise(
        self, requests: Sequence[ImageRequest], embeddings: Embeddings, on_step: OnStep | None = None
    ) -> np.ndarray:
        """Draw the latents of requests of one size and number of steps: -> [b, c, h, w], of videos [b, c, f, h, w]."""
        ...

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Turn latents into pictures, uint8 [b, h, w, 3], or videos, [b, f, h, w, 3]."""
        ...

    def close(self) -> None:
        """Give the model's memory back."""
        ...


@dataclass(frozen=True)
class Student:
    """A loaded backend with the batch size that its batches are padded to; None pads nothing."""

    backend: Backend
    canonical: int | None = None

    def encode_prompts(self, requests: Sequence[ImageRequest]) -> Embeddings:
        """Encode the prompts of a batch."""
        return self.backend.encode_prompts([request.prompt for request in requests], self.canonical)

    def denoise(
        self, requests: Sequence[ImageRequest], embeddings: Embeddings, on_step: OnStep | None = None
    ) -> np.ndarray:
        """Draw latents, padded to the canonical size: requests -> [b, c, h, w].

        Raises:
            ValueError: the batch is empty, mixes sizes or numbers of steps, or is larger than the canonical size.
        """
        _check_alike(requests)
        count = len(requests)
        rows = self._rows(count)
        if len(rows) == count:
            return self.backend.denoise(requests, embeddings, on_step)
        padded = Embeddings(embeddings.tokens[rows], embeddings.pooled[rows])
        watch = on_step and (lambda step, num_steps, x0: on_step(step, num_steps, x0[:count]))
        return self.backend.denoise([requests[row] for row in rows], padded, watch)[:count]

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Turn latents into pictures, padded to the canonical size: -> uint8 [b, h, w, 3]."""
        count = len(latents)
        rows = self._rows(count)
        return self.backend.decode(latents if len(rows) == count else latents[rows])[:count]

    def generate(self, requests: Sequence[ImageRequest]) -> list[np.ndarray]:
        """Run all stages, one after another: -> uint8 [h, w, 3] each, or of videos [f, h, w, 3].

        More requests than the canonical size run as several batches.
        """
        _check_alike(requests)
        step = self.canonical or len(requests)
        images: list[np.ndarray] = []
        for start in range(0, len(requests), step):
            batch = requests[start : start + step]
            images.extend(self.decode(self.denoise(batch, self.encode_prompts(batch))))
        return images

    def warm_up(self, width: int, height: int, sizes: Sequence[int], *, frames: int = 1) -> None:
        """Run a picture or video in every batch size that will be used: no request shall pay for a first time.

        The largest comes first and its prompts are as long as they are read, so that the memory reaches its level.
        Sizes that do not fit into it are left to the scheduler, which learns from such failures.
        """
        for size in sorted(sizes, reverse=True):
            with suppress(OutOfMemory):
                self.generate(
                    [
                        ImageRequest(f"{index} {LONG_PROMPT}", 0, index, width, height, frames=frames)
                        for index in range(size)
                    ]
                )

    def _rows(self, count: int) -> list[int]:
        """Repeat the last row until the canonical size is reached."""
        if self.canonical is not None and count > self.canonical:
            raise ValueError(f"expected at most {self.canonical} rows in a canonical batch, got {count}")
        return [min(row, count - 1) for row in range(self.canonical or count)]


def _check_alike(requests: Sequence[ImageRequest]) -> None:
    if len({(one.width, one.height, one.frames, one.num_steps) for one in requests}) != 1:
        raise ValueError("expected a batch of one size and number of steps with at least one request")


def create_backend(
    name: str, *, threads: int, cache: EmbeddingCache | None = None, synthetic: str = ""
) -> Backend:
    """Create the backend of that name; nothing is loaded yet. Backends may share a cache of embeddings.

    Raises:
        ValueError: there is no such backend; `choice.choose_backend` says which there are.
    """
    if name == "onnx":
        from flashbulb_service.backends.onnx import OnnxBackend

        return OnnxBackend(threads=threads, cache=cache)
    if name == "tensorrt" or name == "torch":
        module = import_module(f"flashbulb_service.backends.{name}")
        return cast(Backend, module.create(threads=threads, cache=cache))
    if name == "synthetic":
        from flashbulb_service.backends.synthetic import SyntheticBackend, SyntheticDevice

        return SyntheticBackend(SyntheticDevice.model_validate_json(synthetic or "{}"))
    raise ValueError(f"expected the name of a backend, got {name!r}")
