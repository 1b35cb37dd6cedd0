"""Every random draw of training is a function of (seed, purpose, step, sample), so a run can be resumed or split.

Sample i of a step draws the same numbers whichever process or batch position computes it.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class Draws:
    """The draws of one run: `seed` and a purpose select a stream, step and sample a place in it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def generator(self, purpose: str, step: int, sample: int) -> np.random.Generator:
        """Return the generator of one sample's draws."""
        name = hashlib.sha256(f"{self._seed}/{purpose}".encode()).digest()
        key = np.frombuffer(name[:16], dtype=np.uint64)
        return np.random.Generator(
            np.random.Philox(key=key, counter=np.array([0, 0, sample, step], np.uint64))
        )

    def normal(
        self, purpose: str, step: int, samples: Iterable[int], shape: Sequence[int]
    ) -> NDArray[np.float32]:
        """Draw unit normal numbers, float32 [samples, *shape]."""
        size = tuple(shape)
        rows = [self.generator(purpose, step, i).standard_normal(size, dtype=np.float32) for i in samples]
        return np.stack(rows)

    def uniform(self, purpose: str, step: int, samples: Iterable[int]) -> NDArray[np.float64]:
        """Draw one number in [0, 1) for each sample, float64 [samples]."""
        return np.array([self.generator(purpose, step, i).random() for i in samples])

    def integers(self, purpose: str, step: int, samples: Iterable[int], high: int) -> NDArray[np.int64]:
        """Draw one integer in [0, high) for each sample, int64 [samples]."""
        return np.array([self.generator(purpose, step, i).integers(high) for i in samples])


class BatchDraws(Draws):
    """Draws of whole batches: several times faster for small samples, and of no use where ranks share a batch."""

    def normal(
        self, purpose: str, step: int, samples: Iterable[int], shape: Sequence[int]
    ) -> NDArray[np.float32]:
        """Draw unit normal numbers, float32 [samples, *shape]."""
        size = (len(list(samples)), *shape)
        return self.generator(purpose, step, 0).standard_normal(size, dtype=np.float32)

    def uniform(self, purpose: str, step: int, samples: Iterable[int]) -> NDArray[np.float64]:
        """Draw one number in [0, 1) for each sample, float64 [samples]."""
        return self.generator(purpose, step, 0).random(len(list(samples)))

    def integers(self, purpose: str, step: int, samples: Iterable[int], high: int) -> NDArray[np.int64]:
        """Draw one integer in [0, high) for each sample, int64 [samples]."""
        return self.generator(purpose, step, 0).integers(high, size=len(list(samples)))
