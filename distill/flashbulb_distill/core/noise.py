"""Noise belongs to the request: drawn on the CPU by a counter-based generator, the same for every device and batch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**63 - 1


def draw_noise(seed: int, index: int, shape: Sequence[int], step: int = 0) -> NDArray[np.float32]:
    """Draw the unit normal noise of one image, float32 of the given shape.

    Args:
        seed: the request's seed, 0 to 2**63 - 1.
        index: the image's number within the request.
        shape: the latents' shape without the batch axis.
        step: which draw of this image: 0 is the start, i the re-noising before time step i.
    Raises:
        ValueError: a negative index or step, or a seed out of range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: expected 0 to {MAX_SEED}, got {seed}")
    if index < 0 or step < 0:
        raise ValueError(f"index and step: expected 0 or more, got {index} and {step}")
    key = np.array([seed, index], dtype=np.uint64)
    counter = np.array([0, 0, 0, step], dtype=np.uint64)  # each step has 2**192 blocks of its own
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return generator.standard_normal(tuple(shape), dtype=np.float32)
