"""Schedules and prediction conversions against their definitions."""

import math

import numpy as np
import pytest
import torch

from flashbulb_distill.core.schedule import add_noise, alpha_sigma, ode_step, to_eps, to_x0

SCHEDULES = ("rectified-flow", "variance-preserving")


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((4, 3)), rng.standard_normal((4, 3))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.01, 0.3, 0.77, 0.99])
def test_what_the_network_meant_is_read_back_as_x0(schedule, t, data):
    x0, eps = data
    alpha, sigma = alpha_sigma(schedule, t)
    xt = add_noise(schedule, x0, eps, t)
    outputs = {"x0": x0, "eps": eps}
    outputs |= {"flow": eps - x0} if schedule == "rectified-flow" else {"v": alpha * eps - sigma * x0}
    for prediction, out in outputs.items():
        np.testing.assert_allclose(to_x0(prediction, schedule, out, xt, t), x0, atol=1e-9)
    np.testing.assert_allclose(to_eps(schedule, x0, xt, t), eps, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends_of_the_schedule_are_data_and_noise(schedule, data):
    x0, eps = data
    np.testing.assert_allclose(add_noise(schedule, x0, eps, 0.0), x0, atol=1e-15)
    np.testing.assert_allclose(add_noise(schedule, x0, eps, 1.0), eps, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ode_step_with_the_true_x0_stays_on_the_sample_path(schedule, data):
    x0, eps = data
    xt = add_noise(schedule, x0, eps, 0.8)
    np.testing.assert_allclose(
        ode_step(schedule, x0, xt, 0.8, 0.5), add_noise(schedule, x0, eps, 0.5), atol=1e-12
    )


def test_rectified_flow_step_is_euler_in_the_velocity(data):
    x0, eps = data
    guess = x0 + 0.1
    xt = add_noise("rectified-flow", x0, eps, 0.6)
    velocity = (xt - guess) / 0.6
    np.testing.assert_allclose(
        ode_step("rectified-flow", guess, xt, 0.6, 0.5), xt - 0.1 * velocity, atol=1e-12
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_numpy_and_torch_agree(schedule, data):
    x0, eps = data
    t = np.array([0.1, 0.4, 0.6, 0.9])[:, None]
    expected = add_noise(schedule, x0, eps, t)
    arrived = add_noise(schedule, torch.from_numpy(x0), torch.from_numpy(eps), torch.from_numpy(t))
    np.testing.assert_allclose(arrived.numpy(), expected, atol=1e-12)


def test_variance_is_preserved():
    for t in np.linspace(0, 1, 11):
        alpha, sigma = alpha_sigma("variance-preserving", float(t))
        assert math.isclose(alpha**2 + sigma**2, 1)
