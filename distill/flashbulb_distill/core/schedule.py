"""How data and noise mix at time t, and what a network's output means.

    xt = alpha(t) * x0 + sigma(t) * eps        t = 0 is data, t = 1 is noise

Everything is a pure function of numbers or arrays; NumPy and torch alike. Per-sample times come shaped to broadcast.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

Prediction = Literal["x0", "eps", "v", "flow"]
Schedule = Literal["rectified-flow", "variance-preserving"]

# An array of NumPy or torch, or a number: whatever supports + - * /.
Array = Any


def alpha_sigma(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    """Return (alpha, sigma) at time t in [0, 1].

    Rectified flow: 1 - t and t (Liu et al. 2022, arXiv 2209.03003, t reversed).
    Variance preserving: cos and sin of pi t / 2.
    """
    if schedule == "rectified-flow":
        return 1 - t, t
    angle = t * (math.pi / 2)
    if isinstance(angle, float):
        return math.cos(angle), math.sin(angle)
    if hasattr(angle, "cos"):  # torch
        return angle.cos(), angle.sin()
    import numpy as np

    return np.cos(angle), np.sin(angle)


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
