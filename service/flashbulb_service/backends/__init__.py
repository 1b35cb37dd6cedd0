"""What runs a batch: chosen by name, never replaced silently by another one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from flashbulb_distill.bundle import Bundle


@dataclass(frozen=True)
class ImageRequest:
    """One picture to make: what the model needs to know, and nothing of queues or HTTP."""

    prompt: str
    seed: int
    index: int  # which image of its request; the noise is drawn from (seed, index)
    width: int
    height: int


@dataclass(frozen=True)
class Generated:
    """The pictures of one batch, in the order of its requests."""

    images: list[np.ndarray]  # uint8 [h, w, 3] each
    stages_ms: dict[str, float] = field(default_factory=dict)  # wall time by stage, for the whole batch


class Backend(Protocol):
    """Runs one collated batch. Knows nothing of queues, HTTP or batching."""

    def load(self, bundle: Bundle) -> None:
        """Make a verified bundle ready to run."""
        ...

    def generate(self, requests: Sequence[ImageRequest]) -> Generated:
        """Make one picture per request, all of one size."""
        ...

    def close(self) -> None:
        """Give the model's memory back."""
        ...


def create_backend(name: str, *, threads: int, synthetic: str = "") -> Backend:
    """Create the backend of that name; nothing is loaded yet.

    Raises:
        ValueError: there is no such backend.
    """
    if name == "onnx":
        from flashbulb_service.backends.onnx import OnnxBackend

        return OnnxBackend(threads=threads)
    if name == "synthetic":
        from flashbulb_service.backends.synthetic import SyntheticBackend, SyntheticDevice

        return SyntheticBackend(SyntheticDevice.model_validate_json(synthetic or "{}"))
    raise ValueError(f"expected the backend 'onnx' or 'synthetic', got {name!r}")
