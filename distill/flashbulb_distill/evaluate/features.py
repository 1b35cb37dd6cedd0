"""Pictures to feature vectors: the eye of the evaluation."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from flashbulb_distill.networks.lite0 import INPUT_SIZE, Lite0, load_lite0, upsample

Images = NDArray[np.uint8]
Embed = Callable[[Images], NDArray[np.float32]]


class Lite0Embed:
    """Pooled EfficientNet-Lite0 features of pictures resized bicubically to 128 px."""

    name = f"efficientnet-lite0@{INPUT_SIZE}"

    def __init__(self, network: Lite0 | None = None, *, batch_size: int = 32) -> None:
        self._network = network or load_lite0()
        self._batch_size = batch_size

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Return features float32 [n, 1280] of pictures uint8 [n, h, w, 3]."""
        chunks = [images[i : i + self._batch_size] for i in range(0, len(images), self._batch_size)]
        return np.concatenate([self._embed(chunk) for chunk in chunks])

    @torch.inference_mode()
    def _embed(self, images: Images) -> NDArray[np.float32]:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        features, _ = self._network(upsample(pixels))
        return np.asarray(features.numpy(), dtype=np.float32)
