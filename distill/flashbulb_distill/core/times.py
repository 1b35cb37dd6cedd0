"""Where on the time axis training looks: pure functions of uniform numbers. t = 0 is data, t = 1 is noise."""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


def biased_times(u: Times, power: float = 3.0) -> Times:
    """Return 1 - u^power: biased to high noise, the more the higher the power.

    Power 3 is ADP's own "cubic" schedule (mean 3/4, median 7/8). A higher one spends a one-step student's training
    where it will be used, at t = 1: with power 10, 63 % of the times lie above 0.99.

    Source: arXiv 2507.18569, section on adversarial distillation pre-training.
    Raises:
        ValueError: power < 1.
    """
    if power < 1:
        raise ValueError(f"expected a power of at least 1, got {power}")
    return 1 - u**power


def adm_times(u: Times, *, low: float, high: float) -> Times:
    """Return times uniform in [low, high): where ADM noises the student's samples.

    Raises:
        ValueError: not 0 < low < high <= 1.
    """
    if not 0 < low < high <= 1:
        raise ValueError(f"expected 0 < low < high <= 1, got {low} and {high}")
    return low + (high - low) * u


def logit_normal_times(u: Times, *, mean: float, std: float, low: float = 0.0, high: float = 1.0) -> Times:
    """Return times in (low, high) whose logit is normal, cut off at the ends: more of them near sigmoid(mean).

    Source: Esser et al. 2024 (SD3, arXiv 2403.03206), equation 19.
    Raises:
        ValueError: not 0 <= low < high <= 1, or std <= 0.
    """
    if not 0 <= low < high <= 1 or std <= 0:
        raise ValueError(f"expected 0 <= low < high <= 1 and std > 0, got {low}, {high} and {std}")
    normal = NormalDist(mean, std)
    first, last = (normal.cdf(np.log(t / (1 - t))) if 0 < t < 1 else t for t in (low, high))
    # Away from 0 and 1, where the quantile has its poles.
    shares = np.clip(first + (last - first) * np.asarray(u), 1e-12, 1 - 1e-12)
    logits = np.array([normal.inv_cdf(share) for share in shares])
    return np.asarray(1 / (1 + np.exp(-logits)))


def ode_times(num_steps: int, *, shift: float = 1.0) -> tuple[float, ...]:
    """Return num_steps + 1 times from 1 to 0, in equal steps for shift 1, closer together at high noise above it.

    Source: Esser et al. 2024 (SD3, arXiv 2403.03206), equation 23, with `shift` = sqrt(m / n).
    Raises:
        ValueError: num_steps < 1 or shift <= 0.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"expected num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    even = [1 - index / num_steps for index in range(num_steps + 1)]
    return tuple(shift * t / (1 + (shift - 1) * t) for t in even)
