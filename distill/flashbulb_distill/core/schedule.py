"""How data and noise mix at time t, and what a network's output means.

    xt = alpha(t) * x0 + sigma(t) * eps        t = 0 is data, t = 1 is noise

Everything is a pure function of numbers or arrays; NumPy and torch alike. Per-sample times come shaped to broadcast.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from ..bundle import Betas

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Prediction = Literal["x0", "eps", "v", "flow"]
Schedule = Literal["rectified-flow", "variance-preserving"] | Betas

# An array of NumPy or torch, or a number: whatever supports + - * /.
Array = Any


def alpha_sigma(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    """Return (alpha, sigma) at time t in [0, 1].

    Rectified flow: 1 - t and t (Liu et al. 2022, arXiv 2209.03003, t reversed).
    Variance preserving: cos and sin of an angle that grows from 0 to pi / 2: of pi t / 2, or of the angles of a
    network's own discrete noise levels, joined by straight lines.
    """
    if schedule == "rectified-flow":
        return 1 - t, t
    angle = _discrete_angle(schedule, t) if isinstance(schedule, Betas) else t * (math.pi / 2)
    if isinstance(angle, float):
        return math.cos(angle), math.sin(angle)
    if hasattr(angle, "cos"):  # torch
        return angle.cos(), angle.sin()
    import numpy as np

    return np.cos(angle), np.sin(angle)


@lru_cache(maxsize=32)
def discrete_angles(betas: Betas) -> "NDArray[np.float64]":
    """Return arccos(alpha) at the times 0, 1/n, ..., 1, float64 [n + 1].

    Time k/n is timestep k - 1 of the network; time 0 is clean data. Scaled linear betas (Rombach et al. 2022, arXiv
    2112.10752), the signal-to-noise ratio divided by `snr_shift`, then the last level moved to pure noise
    (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    """
    import numpy as np

    beta = np.linspace(betas.beta_start**0.5, betas.beta_end**0.5, betas.num_timesteps) ** 2
    squared = np.cumprod(1 - beta)
    squared = squared / (betas.snr_shift + (1 - betas.snr_shift) * squared)
    alpha = np.sqrt(squared)
    if betas.zero_terminal_snr:
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    angles: NDArray[np.float64] = np.concatenate([[0.0], np.arccos(alpha)])
    return angles


def _discrete_angle(betas: Betas, t: Array) -> Array:
    table = discrete_angles(betas)
    if isinstance(t, (int, float)):
        low = min(int(t * betas.num_timesteps), betas.num_timesteps - 1)
        part = t * betas.num_timesteps - low
        return float(table[low] + part * (table[low + 1] - table[low]))
    if hasattr(t, "new_tensor"):  # torch
        place = t.double() * betas.num_timesteps
        values, index = place.new_tensor(table), place.long().clamp(0, betas.num_timesteps - 1)
        angle = values[index] + (place - index) * (values[index + 1] - values[index])
        return angle.to(t.dtype)
    import numpy as np

    return np.interp(t, np.linspace(0, 1, len(table)), table).astype(np.asarray(t).dtype)


def add_noise(schedule: Schedule, x0: Array, eps: Array, t: Array) -> Array:
    """Forward process: xt = alpha(t) x0 + sigma(t) eps."""
    alpha, sigma = alpha_sigma(schedule, t)
    return alpha * x0 + sigma * eps


# out, xt, alpha, sigma -> x0
_TO_X0: dict[Prediction, Callable[[Array, Array, Array, Array], Array]] = {
    "x0": lambda out, xt, alpha, sigma: out,
    "eps": lambda out, xt, alpha, sigma: (xt - sigma * out) / alpha,
    "v": lambda out, xt, alpha, sigma: alpha * xt - sigma * out,  # alpha^2 + sigma^2 = 1 only
    "flow": lambda out, xt, alpha, sigma: xt - sigma * out,  # alpha + sigma = 1 only
}


def to_x0(prediction: Prediction, schedule: Schedule, out: Array, xt: Array, t: Array) -> Array:
    """Read a network's output at (xt, t) as an estimate of the clean latents."""
    alpha, sigma = alpha_sigma(schedule, t)
    return _TO_X0[prediction](out, xt, alpha, sigma)


def to_eps(schedule: Schedule, x0_hat: Array, xt: Array, t: Array) -> Array:
    """Return the noise that, with the estimate x0_hat, makes xt. Undefined at t = 0."""
    alpha, sigma = alpha_sigma(schedule, t)
    return (xt - alpha * x0_hat) / sigma


def ode_step(schedule: Schedule, x0_hat: Array, xt: Array, t: Array, s: Array) -> Array:
    """Take one probability-flow step from time t to time s < t (DDIM; Euler for rectified flow)."""
    alpha, sigma = alpha_sigma(schedule, s)
    return alpha * x0_hat + sigma * to_eps(schedule, x0_hat, xt, t)
