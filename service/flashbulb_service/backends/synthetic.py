"""A device that sleeps instead of computing: for load tests, simulations and failure drills, never for users.

It takes tau(b) per batch, with seeded noise, and can be told to run out of memory, to hang, and to fail on
marked prompts. Its pictures are small, real, and a function of (prompt, seed, index) alone, so that byte
equality across runs, batches and crashes can be checked.

    FLASHBULB_BACKEND=synthetic FLASHBULB_SYNTHETIC='{"base_ms": 4.3, "row_ms": 4.93, "floor_ms": 17}'
"""

import hashlib
import math
import time
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from flashbulb_distill.bundle import Bundle
from flashbulb_service.backends import Embeddings, ImageRequest, OnStep
from flashbulb_service.errors import BackendError, OutOfMemory


class SyntheticDevice(BaseModel):
    """How the device behaves; the defaults are one step of a large model on a large GPU, ten times faster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    floor_ms: float = Field(default=17.0, ge=0)
    base_ms: float = Field(default=4.3, ge=0)
    row_ms: float = Field(default=4.93, ge=0)
    frame_ms: float = Field(default=0.0, ge=0, description="each frame and step of a row of videos, on top")
    noise: float = Field(default=0.0, ge=0, le=2, description="sigma of log-normal noise on the time")
    seed: int = Field(default=0, ge=0)
    memory_rows: int | None = Field(default=None, ge=0, description="larger batches run out of memory")
    hang_share: float = Field(default=0.0, ge=0, le=1, description="share of batches that take hang_s")
    hang_s: float = Field(default=30.0, ge=0)
    bad_word: str | None = Field(default=None, min_length=1, description="prompts with it fail their batch")


class SyntheticBackend:
    """The device as a backend: any bundle will do, of which nothing but the shape is used."""

    name = "synthetic"

    def __init__(self, device: SyntheticDevice | None = None) -> None:
        """Start the device's own random numbers."""
        self._device = device or SyntheticDevice()
        self._random = np.random.Generator(np.random.Philox(self._device.seed))
        self._is_video, self._num_steps = False, 1

    def load(self, bundle: Bundle) -> None:
        """Note what the student makes, and in how many steps: there is no model."""
        self._is_video = bundle.manifest.is_video
        self._num_steps = len(bundle.manifest.time_steps)

    def encode_prompts(self, prompts: Sequence[str], pad_to: int | None = None) -> Embeddings:
        """Return rows without content."""
        return Embeddings(np.zeros((len(prompts), 0, 0)), np.zeros((len(prompts), 0)))

    def denoise(
        self, requests: Sequence[ImageRequest], embeddings: Embeddings, on_step: OnStep | None = None
    ) -> np.ndarray:
        """Take the time of a batch, then draw: -> uint8 [b, 3, h, w], of videos [b, 3, f, h, w].

        Raises:
            OutOfMemory: more rows than fit.
            BackendError: a prompt has the bad word.
        """
        device, size = self._device, len(requests)
        if device.memory_rows is not None and size > device.memory_rows:
            raise OutOfMemory(f"expected at most {device.memory_rows} rows in memory, got {size}")
        if device.bad_word and any(device.bad_word in request.prompt for request in requests):
            raise BackendError(f"told to fail on prompts with {device.bad_word!r}")
        num_steps = requests[0].num_steps or self._num_steps
        batch_s = self._next_ms(size) / 1000
        num_frames = requests[0].frames if self._is_video else 0
        batch_s += device.frame_ms * num_frames * num_steps * size / 1000
        pictures = np.moveaxis(np.stack([draw(request, num_frames) for request in requests]), -1, 1)
        for step in range(num_steps):
            time.sleep(batch_s / num_steps)
            if on_step is not None:
                on_step(step, num_steps, pictures)
        return pictures

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Put the colours last: -> uint8 [b, h, w, 3], of videos [b, f, h, w, 3]."""
        return np.ascontiguousarray(np.moveaxis(latents, 1, -1))

    def close(self) -> None:
        """Do nothing."""

    def _next_ms(self, size: int) -> float:
        device = self._device
        hangs, noise = self._random.random() < device.hang_share, self._random.standard_normal()
        if hangs:
            return device.hang_s * 1000
        return max(device.floor_ms, device.base_ms + device.row_ms * size) * math.exp(device.noise * noise)


def draw(request: ImageRequest, num_frames: int = 0) -> np.ndarray:
    """Draw the picture of a request: uint8 [h, w, 3], four by four fields of colour from a hash of the request.

    With num_frames, a video of them, [f, h, w, 3]: the fields move around a pixel a frame.
    """
    text = f"{request.seed}\0{request.index}\0{request.prompt}".encode()
    colours = np.frombuffer(hashlib.shake_256(text).digest(48), dtype=np.uint8).reshape(4, 4, 3)
    rows = np.arange(request.height) * 4 // request.height
    columns = np.arange(request.width) * 4 // request.width
    picture = np.ascontiguousarray(colours[rows][:, columns])
    if not num_frames:
        return picture
    return np.stack([np.roll(picture, frame, axis=1) for frame in range(num_frames)])
