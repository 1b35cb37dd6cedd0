"""Where on the time axis training looks: pure functions of uniform numbers. t = 0 is data, t = 1 is noise."""

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


def cubic_times(u: Times) -> Times:
    """Return 1 - u^3: ADP's schedule, biased to high noise (mean 3/4, median 7/8).

    Source: arXiv 2507.18569, section on adversarial distillation pre-training.
    """
    return 1 - u**3


def adm_times(u: Times, *, low: float, high: float) -> Times:
    """Return times uniform in [low, high): where ADM noises the student's samples.

    Raises:
        ValueError: not 0 < low < high <= 1.
    """
    if not 0 < low < high <= 1:
        raise ValueError(f"expected 0 < low < high <= 1, got {low} and {high}")
    return low + (high - low) * u
