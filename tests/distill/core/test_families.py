"""Noise levels of the model families against diffusers' own schedulers."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbulb_distill.bundle import Betas
from flashbulb_distill.core.sampler import sample_ode
from flashbulb_distill.core.schedule import add_noise, alpha_sigma, ode_step, to_x0
from flashbulb_distill.core.times import ode_times

BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
LEVELS = {
    "sdxl": Betas(**BETAS),
    "cogvideox-2b": Betas(**BETAS, snr_shift=3.0, zero_terminal_snr=True),
    "cogvideox-5b": Betas(**BETAS, zero_terminal_snr=True),
}
# float32 tables of diffusers: sqrt(1 - alpha_bar) loses digits where alpha_bar is near 1. Measured: 2e-6.
TOLERANCE = 2e-5


def scheduler_of(name, prediction):
    if name == "sdxl":
        return DDIMScheduler(
            **BETAS,
            beta_schedule="scaled_linear",
            prediction_type=prediction,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
        )
    return CogVideoXDDIMScheduler(
        **BETAS,
        prediction_type=prediction,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=LEVELS[name].snr_shift,
    )


@pytest.mark.parametrize("name", LEVELS)
def test_every_noise_level_is_the_schedulers_own(name):
    alphas = scheduler_of(name, "epsilon").alphas_cumprod.double().numpy()
    times = (np.arange(1000) + 1) / 1000
    alpha, sigma = alpha_sigma(LEVELS[name], times)
    np.testing.assert_allclose(alpha, np.sqrt(alphas), atol=TOLERANCE)
    np.testing.assert_allclose(sigma, np.sqrt(1 - alphas), atol=TOLERANCE)
    assert alpha_sigma(LEVELS[name], 0.0) == (1.0, 0.0)
    if LEVELS[name].zero_terminal_snr:
        np.testing.assert_allclose(alpha_sigma(LEVELS[name], 1.0), (0, 1), atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(t=st.floats(0, 1), name=st.sampled_from(sorted(LEVELS)))
def test_numbers_numpy_and_torch_agree_at_any_time_and_preserve_variance(t, name):
    alpha, sigma = alpha_sigma(LEVELS[name], t)
    assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)
    for array in (np.array([t]), torch.tensor([t], dtype=torch.float64)):
        a, s = alpha_sigma(LEVELS[name], array)
        assert (float(a[0]), float(s[0])) == pytest.approx((alpha, sigma), abs=1e-12)


@pytest.mark.parametrize("name", LEVELS)
def test_noise_grows_with_time(name):
    times = np.linspace(0, 1, 5001)
    assert (np.diff(alpha_sigma(LEVELS[name], times)[1]) > 0).all()


@pytest.mark.parametrize(("name", "theirs", "ours"), [
    ("sdxl", "epsilon", "eps"),
    ("sdxl", "v_prediction", "v"),
    ("sdxl", "sample", "x0"),
    ("cogvideox-2b", "v_prediction", "v"),
    ("cogvideox-5b", "v_prediction", "v"),
])  # fmt: skip
@pytest.mark.parametrize("timestep", [19, 499, 979, 999])
def test_a_step_is_ddims_own(name, theirs, ours, timestep):
    scheduler = scheduler_of(name, theirs)
    scheduler.set_timesteps(50)
    torch.manual_seed(timestep)
    xt, out = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = scheduler.step(out, timestep, xt)
    t, s = (timestep + 1) / 1000, (timestep - 19) / 1000
    x0 = to_x0(ours, LEVELS[name], out, xt, t)
    scale = float(expected.pred_original_sample.abs().max())
    torch.testing.assert_close(x0, expected.pred_original_sample, atol=TOLERANCE * scale, rtol=0)
    xs = ode_step(LEVELS[name], x0, xt, t, s)
    torch.testing.assert_close(xs, expected.prev_sample, atol=TOLERANCE * scale, rtol=0)


@pytest.mark.parametrize("name", LEVELS)
def test_noising_is_the_schedulers_own(name):
    torch.manual_seed(0)
    x0, eps, timesteps = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 10, 700, 999])
    expected = scheduler_of(name, "epsilon").add_noise(x0, eps, timesteps)
    t = (timesteps[:, None] + 1) / 1000
    torch.testing.assert_close(add_noise(LEVELS[name], x0, eps, t), expected, atol=TOLERANCE, rtol=0)


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(0.5, 6), num_steps=st.integers(1, 40))
def test_shifted_flow_sampling_is_the_flow_schedulers_own(shift, num_steps):
    """One loop of Euler steps, ours and theirs, on the same nonlinear velocity."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)])
    torch.manual_seed(0)
    xt = noise = torch.randn(2, 3)
    for timestep in scheduler.timesteps:
        xt = scheduler.step(torch.tanh(xt) + timestep / 1000, timestep, xt).prev_sample
    arrived = sample_ode(
        lambda x, t: torch.tanh(x) + t,
        noise,
        num_steps,
        prediction="flow",
        schedule="rectified-flow",
        shift=shift,
    )
    torch.testing.assert_close(arrived, xt, atol=1e-4, rtol=1e-4)


def test_times_of_a_teacher_run_from_noise_to_data():
    assert ode_times(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert ode_times(2, shift=3.0) == (1.0, 0.75, 0.0)
    with pytest.raises(ValueError, match="expected num_steps >= 1 and shift > 0"):
        ode_times(0)
