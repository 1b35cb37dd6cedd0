"""Points in the plane as small pictures, for a grid of entries and seeds."""

import numpy as np
from numpy.typing import NDArray

from ..evaluate.features import Images

SIDE_PX = 96


def draw_points(points: NDArray[np.float64], extent: float, side: int = SIDE_PX) -> Images:
    """Return points [n, 2] as a picture uint8 [side, side, 3]: the more in a pixel, the darker; y grows upwards.

    Args:
        extent: the picture shows -extent to extent on both axes.
    """
    edges = np.linspace(-extent, extent, side + 1)
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=(edges, edges))
    # A pixel with a quarter of what the fullest of an even spread over a tenth of the picture would hold is black.
    ink = np.clip(np.sqrt(counts * (0.1 * side * side / 16) / max(len(points), 1)), 0, 1)
    shade = (255 - 235 * ink[::-1]).round().astype(np.uint8)
    return np.repeat(shade[..., None], 3, axis=2)
