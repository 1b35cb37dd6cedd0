"""Six motions as tracks: where the subject is and how large, as functions of the time in the clip. Pure."""

from collections.abc import Callable

import numpy as np

# name in captions -> (u, phase in [0, 1), strength near 1) -> (x, y, scale); x and y are shifts of the centre in
# sides of the clip (y down), scale multiplies the resting size. u in [0, 1] is the time.
Track = Callable[[np.ndarray, float, float], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _bouncing(u: np.ndarray, phase: float, strength: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    height = np.abs(np.sin(np.pi * (1.5 * u + 0.3 * phase)))
    return 0 * u, 0.22 - 0.44 * strength * height, 1 + 0 * u


def _slide(dx: float, dy: float) -> Track:
    def track(u: np.ndarray, phase: float, strength: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        along = 0.5 * strength * (u - 0.5) + 0.06 * (phase - 0.5)
        return dx * along, dy * along, 1 + 0 * u

    return track


def _resize(first: float, last: float) -> Track:
    def track(u: np.ndarray, phase: float, strength: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        middle = np.sqrt(first * last)
        return (
            0 * u,
            0 * u,
            middle * (first / middle) ** (strength * (1 - u)) * (last / middle) ** (strength * u),
        )

    return track


MOTIONS: dict[str, Track] = {
    "bouncing": _bouncing,
    "flying up": _slide(0.0, -1.0),
    "sliding left": _slide(-1.0, 0.0),
    "sliding right": _slide(1.0, 0.0),
    "growing": _resize(0.55, 1.6),
    "shrinking": _resize(1.6, 0.55),
}


def is_held_out(subject_index: int, motion_index: int) -> bool:
    """Tell whether a subject never makes a motion in training: one motion a subject, evenly spread."""
    return motion_index == subject_index % len(MOTIONS)
