"""Motion measured from the pixels of clips on a white ground: where the subject is, how large, and what it does.

Each frame is read as ink, its distance from white. The ink's centre and spread over time are the subject's track; a
motion's amplitude is read off the track, in parts of what the clips that were trained on show.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Track = NDArray[np.float64]

FAINT = 0.1  # less ink than this is ground: codecs and denoisers leave some everywhere
ENDS = 3  # frames at each end that are averaged
UNMOVED = 0.3  # an amplitude below this is no motion

# What the training clips show: half a side along a slide, a factor of 1.6 / 0.55 in size, 0.44 sides of height.
FULL_SLIDE, FULL_GROWTH, FULL_BOUNCE = 0.5, float(np.log(1.6 / 0.55)), 0.44


@dataclass(frozen=True)
class SubjectTrack:
    """A subject over the frames of a clip: centre and spread, in sides of the clip, float64 [frames]; y goes down."""

    x: Track
    y: Track
    spread: Track


def track_subject(clip: NDArray[np.uint8]) -> SubjectTrack:
    """Follow the ink of a clip, uint8 [frames, h, w, 3]. A frame without ink counts as its middle, with no spread.

    Raises:
        ValueError: the array is no such clip.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or len(clip) < 2 * ENDS:
        raise ValueError(
            f"expected uint8 [f, h, w, 3] of {2 * ENDS} frames or more, got {clip.dtype} {list(clip.shape)}"
        )
    ink = 1 - clip.astype(np.float64).min(axis=3) / 255
    ink = np.where(ink < FAINT, 0.0, ink)
    mass = ink.sum((1, 2))
    share = ink / np.maximum(mass, 1e-9)[:, None, None]
    height, width = clip.shape[1:3]
    xs, ys = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    x = np.where(mass > 0, (share.sum(1) * xs).sum(1), 0.5)
    y = np.where(mass > 0, (share.sum(2) * ys).sum(1), 0.5)
    variance = (share.sum(1) * (xs - x[:, None]) ** 2).sum(1) + (share.sum(2) * (ys - y[:, None]) ** 2).sum(1)
    return SubjectTrack(x, y, np.sqrt(np.maximum(variance, 0)))


def amplitudes(track: SubjectTrack) -> dict[str, float]:
    """Return how strongly a track makes each motion: about 1 as in the training clips, 0 or less not at all."""
    right = _change(track.x) / FULL_SLIDE
    up = -_change(track.y) / FULL_SLIDE
    growth = _change(np.log(np.maximum(track.spread, 1e-3))) / FULL_GROWTH
    # A bounce is what a straight line cannot explain: rise and fall within the clip.
    line = np.linspace(track.y[:ENDS].mean(), track.y[-ENDS:].mean(), len(track.y))
    return {
        "bouncing": float(np.ptp(track.y - line)) / FULL_BOUNCE,
        "flying up": up,
        "sliding left": -right,
        "sliding right": right,
        "growing": growth,
        "shrinking": -growth,
    }


def name_motion(clip: NDArray[np.uint8]) -> str | None:
    """Return the motion that a clip shows most strongly; None where nothing moves."""
    found = amplitudes(track_subject(clip))
    name = max(found, key=found.__getitem__)
    return name if found[name] >= UNMOVED else None


def _change(values: Track) -> float:
    return float(values[-ENDS:].mean() - values[:ENDS].mean()) * len(values) / (len(values) - ENDS)
