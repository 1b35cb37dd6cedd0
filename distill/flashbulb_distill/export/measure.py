"""What a bundle does on this machine's onnxruntime: time by batch size, and whether neighbours change pixels."""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .parity import open_session

Feeds = Mapping[str, NDArray[np.float32] | NDArray[np.int64]]
Parts = Mapping[str, tuple[Path, Feeds]]  # component -> (graph, inputs of at least the largest batch)


def is_batch_invariant(parts: Parts, sizes: tuple[int, ...]) -> bool:
    """Tell whether every row of every component has the same bytes alone as in each batch size, at each place."""
    for path, feeds in parts.values():
        session = open_session(path)
        alone = [_run(session, feeds, slice(i, i + 1)) for i in range(max(sizes))]
        for size in sizes:
            together = _run(session, feeds, slice(0, size))
            for row in range(size):
                for whole, single in zip(together, alone[row], strict=True):
                    if whole[row].tobytes() != single[0].tobytes():
                        return False
    return True


def batch_times_ms(
    parts: Parts, sizes: tuple[int, ...], *, num_steps: int, rounds: int = 7
) -> dict[int, float]:
    """Return a batch's median time, its denoiser run `num_steps` times, in milliseconds, by batch size."""
    sessions = {name: (open_session(path), feeds) for name, (path, feeds) in parts.items()}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds + 1):
        for size in sizes:
            started = time.perf_counter()
            for name, (session, feeds) in sessions.items():
                for _ in range(num_steps if name == "denoiser" else 1):
                    _run(session, feeds, slice(0, size))
            seconds[size].append(time.perf_counter() - started)
    return {size: round(statistics.median(values[1:]) * 1000, 3) for size, values in seconds.items()}


def _run(session: onnxruntime.InferenceSession, feeds: Feeds, rows: slice) -> list[NDArray[np.float32]]:
    outputs: list[NDArray[np.float32]] = session.run(
        None, {name: value[rows] for name, value in feeds.items()}
    )
    return outputs
