"""The one sampler: training, evaluation, export parity and every backend call it. NumPy and torch arrays alike."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

from .schedule import Array, Prediction, Schedule, add_noise, alpha_sigma, ode_step, to_eps, to_x0
from .times import ode_times


def sample_steps(
    denoise: Callable[[Array, float], Array],
    noise: Array,
    time_steps: Sequence[float],
    *,
    prediction: Prediction,
    schedule: Schedule,
    renoise: Callable[[int], Array] | None = None,
) -> Iterator[Array]:
    """Yield the student's estimate of the clean latents after each of its time steps.

    Args:
        denoise: (xt, t in (0, 1]) -> the network's output.
        noise: [b, ...] unit normal, the state at the first time step (which is 1 for a one-step student).
        time_steps: descending, in (0, 1].
        renoise: step index -> fresh unit noise for the state at that step; needed for more than one step.
    Raises:
        ValueError: several time steps and no `renoise`.
    """
    if len(time_steps) > 1 and renoise is None:
        raise ValueError(f"expected renoise for {len(time_steps)} time steps, got None")
    xt = x0 = noise
    for index, t in enumerate(time_steps):
        if index > 0 and renoise is not None:
            xt = add_noise(schedule, x0, renoise(index), t)
        x0 = to_x0(prediction, schedule, denoise(xt, t), xt, t)
        yield x0


def sample(
    denoise: Callable[[Array, float], Array],
    noise: Array,
    time_steps: Sequence[float],
    *,
    prediction: Prediction,
    schedule: Schedule,
    renoise: Callable[[int], Array] | None = None,
) -> Array:
    """Return the clean latents of a few-step student; see `sample_steps`."""
    *_, x0 = sample_steps(
        denoise, noise, time_steps, prediction=prediction, schedule=schedule, renoise=renoise
    )
    return x0


def sample_ode(
    denoise: Callable[[Array, float], Array],
    noise: Array,
    num_steps: int,
    *,
    prediction: Prediction,
    schedule: Schedule,
    shift: float = 1.0,
    order: Literal[1, 2] = 1,
) -> Array:
    """Integrate the probability-flow ODE from t = 1 to 0: how a teacher samples.

    Args:
        shift: of the times, see `ode_times`; 1 is equal steps.
        order: of the error in the step; 1 is DDIM (Euler for rectified flow), 2 is Adams-Bashforth on
            dx = x0 d(alpha) + eps d(sigma). Both ask the network once per step.
    """
    xt = noise
    before: tuple[Array, Array, float] | None = None
    for t, s in pairwise(ode_times(num_steps, shift=shift)):
        x0_hat = to_x0(prediction, schedule, denoise(xt, t), xt, t)
        if order == 1:
            xt = ode_step(schedule, x0_hat, xt, t, s)
            continue
        eps_hat = to_eps(schedule, x0_hat, xt, t)
        x0_mid, eps_mid = x0_hat, eps_hat
        if before is not None:
            x0_before, eps_before, t_before = before
            ahead = (s - t) / (2 * (t - t_before))  # to the middle of the step, in units of the last one
            x0_mid = x0_hat + ahead * (x0_hat - x0_before)
            eps_mid = eps_hat + ahead * (eps_hat - eps_before)
        before = x0_hat, eps_hat, t
        (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
        xt = xt + (alpha_s - alpha) * x0_mid + (sigma_s - sigma) * eps_mid
    return xt
