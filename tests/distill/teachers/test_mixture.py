"""The exact teacher against numbers that another method computes."""

import numpy as np
import pytest
import torch

from flashbulb_distill.teachers.denoiser import Condition, guided_x0, join
from flashbulb_distill.teachers.mixture import MixtureDenoiser, ring

COND = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize("t", [0.2, 0.6, 0.95])
def test_mixtures_denoiser_is_the_posterior_mean_found_by_integration(t):
    centres, std = ring(3), 0.3
    denoiser = MixtureDenoiser(centres, std)
    xt = torch.tensor([[0.4, -0.7], [1.1, 0.9]])
    axis = np.linspace(-5, 5, 801)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    gaps = grid[:, None] - centres.numpy()
    prior = np.exp(-(gaps**2).sum(-1) / (2 * std**2)).sum(1)
    for row in xt.numpy():
        likelihood = np.exp(-((row - (1 - t) * grid) ** 2).sum(-1) / (2 * t**2))
        posterior = prior * likelihood
        expected = (posterior[:, None] * grid).sum(0) / posterior.sum()
        arrived = denoiser(torch.tensor(row)[None, :, None, None], torch.tensor([t]), COND)
        np.testing.assert_allclose(arrived.flatten().numpy(), expected, atol=2e-3)


def test_at_full_noise_the_estimate_is_the_mean_of_the_data():
    denoiser = MixtureDenoiser(ring(5), 0.2)
    arrived = denoiser(torch.randn(4, 2, 1, 1), torch.ones(4), COND)
    np.testing.assert_allclose(arrived.numpy(), 0, atol=1e-5)


def test_guidance_moves_along_the_difference_of_the_two_estimates():
    class Echo(MixtureDenoiser):
        def forward(self, xt, t, cond):
            return xt + cond.pooled[:, :1, None, None]

    echo = Echo(ring(2), 0.1)
    xt, t = torch.zeros(3, 2, 1, 1), torch.full((3,), 0.5)
    cond, uncond = Condition(torch.zeros(3, 1, 1), torch.ones(3, 1)), COND
    assert guided_x0(echo, xt, t, cond, uncond, 3.0).unique().tolist() == [3.0]
    assert guided_x0(echo, xt, t, cond, uncond, 1.0).unique().tolist() == [1.0]
    assert len(join(cond, uncond.expand(3))) == 6
