"""The sampler against exact answers on a Gaussian, whose ideal denoiser is linear."""

import numpy as np
import pytest
import torch

from flashbulb_distill.core.sampler import sample, sample_ode
from flashbulb_distill.core.schedule import alpha_sigma
from flashbulb_distill.core.times import adm_times, biased_times

MEAN, STD = 1.5, 0.4


def denoise(xt, t):
    """E[x0 | xt] for x0 ~ N(MEAN, STD^2) under rectified flow."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return MEAN + (1 - t) * STD**2 / variance * (xt - (1 - t) * MEAN)


def test_one_step_returns_the_networks_estimate():
    noise = np.random.default_rng(0).standard_normal((5, 2))
    arrived = sample(denoise, noise, (1.0,), prediction="x0", schedule="rectified-flow")
    np.testing.assert_allclose(arrived, np.full((5, 2), MEAN))


def test_ode_carries_unit_noise_to_the_data_distribution():
    """The flow of a Gaussian is x0 = MEAN + STD * noise, exactly."""
    noise = np.random.default_rng(0).standard_normal(4000)
    arrived = sample_ode(denoise, noise, 400, prediction="x0", schedule="rectified-flow")
    np.testing.assert_allclose(arrived, MEAN + STD * noise, atol=0.02)


@pytest.mark.parametrize("schedule", ["rectified-flow", "variance-preserving"])
@pytest.mark.parametrize("order", [1, 2])
def test_the_error_of_the_ode_falls_with_the_steps_as_the_order_says(schedule, order):
    """On the same Gaussian, under both schedules: twice the steps, half the error for order 1, a quarter for 2."""

    def ideal(xt, t):
        alpha, sigma = alpha_sigma(schedule, t)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (xt - alpha * MEAN)

    noise = np.random.default_rng(0).standard_normal(200)
    errors = [
        np.abs(
            sample_ode(ideal, noise, steps, prediction="x0", schedule=schedule, order=order)
            - (MEAN + STD * noise)
        ).max()
        for steps in (64, 128)
    ]
    assert 0.8 * 2**order < errors[0] / errors[1] < 1.25 * 2**order, errors


def test_few_steps_with_renoising_have_the_variance_that_the_linear_denoiser_implies():
    steps, count = (1.0, 0.5, 0.2, 0.05), 20_000
    rng = np.random.default_rng(0)
    fresh = {i: rng.standard_normal(count) for i in range(1, 4)}
    arrived = sample(
        denoise,
        rng.standard_normal(count),
        steps,
        prediction="x0",
        schedule="rectified-flow",
        renoise=fresh.get,
    )
    variance = 0.0
    for t in steps:  # of x0 after each step: xt = (1 - t) x0 + t eps, then the denoiser's gain
        gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
        variance = gain**2 * ((1 - t) ** 2 * variance + t**2)
    assert abs(arrived.mean() - MEAN) < 0.01
    np.testing.assert_allclose(arrived.std(), variance**0.5, rtol=0.02)


def test_several_steps_without_renoise_are_refused():
    with pytest.raises(ValueError, match="renoise"):
        sample(denoise, np.zeros(2), (1.0, 0.5), prediction="x0", schedule="rectified-flow")


def test_numpy_and_torch_give_the_same_sample():
    noise = np.random.default_rng(1).standard_normal((3, 2))
    options = {"prediction": "x0", "schedule": "rectified-flow"}
    expected = sample_ode(denoise, noise, 7, **options)
    np.testing.assert_allclose(sample_ode(denoise, torch.from_numpy(noise), 7, **options).numpy(), expected)


def test_cubic_times_have_the_papers_mean_and_median():
    u = (np.arange(100_000) + 0.5) / 100_000
    times = biased_times(u)
    assert abs(times.mean() - 0.75) < 1e-4
    assert abs(np.median(times) - 0.875) < 1e-4
    assert abs((times > 0.9).mean() - 0.464) < 1e-3


def test_adm_times_stay_in_their_range_and_a_bad_range_is_refused():
    times = adm_times(np.array([0.0, 0.5, 0.999]), low=0.02, high=0.98)
    np.testing.assert_allclose(times, [0.02, 0.5, 0.97904])
    with pytest.raises(ValueError, match="0 < low < high"):
        adm_times(np.zeros(1), low=0.5, high=0.5)
