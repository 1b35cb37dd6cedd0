"""The video family's network: what goes in and out, and that its output is a velocity."""

import pytest
import torch

from flashbulb_distill.core.schedule import add_noise
from flashbulb_distill.teachers.denoiser import Condition, spread
from flashbulb_distill.teachers.emoji_motion import MotionDenoiser, build_transformer


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    made = MotionDenoiser(build_transformer(channels=8, num_layers=2, num_heads=2, head_dim=16))
    for parameter in made.parameters():
        if not parameter.any():  # an untrained network says nothing
            torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    cond = Condition(torch.randn(3, 14, 384, generator=generator), torch.zeros(3, 384))
    return torch.randn(3, 8, 4, 4, 4, generator=generator), torch.tensor([0.1, 0.5, 1.0]), cond


def test_it_says_one_thing_for_each_latent_and_rows_do_not_meet(denoiser, inputs):
    xt, t, cond = inputs
    out = denoiser(xt, t, cond)
    assert out.shape == xt.shape
    for row in range(3):
        pick = torch.tensor([row])
        alone = denoiser(xt[pick], t[pick], cond.take(pick))
        torch.testing.assert_close(alone[0], out[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_it_tells_places_and_moments_apart(denoiser, inputs, axis):
    """Rotary embeddings: the same tokens in another order are another clip."""
    xt, t, cond = inputs
    turned = denoiser(xt.flip(axis), t, cond).flip(axis)
    assert not torch.allclose(turned, denoiser(xt, t, cond), atol=1e-2)


def test_features_are_maps_over_moments_and_places_and_the_last_one_makes_the_output(denoiser, inputs):
    xt, t, cond = inputs
    first, last = denoiser.features(xt, t, cond, [0, 1])
    assert first.shape == last.shape == (3, 32, 4, 4, 4)
    moved = xt.clone()
    moved[:, :, 2, 1, 3] += 3
    changed = (denoiser.features(moved, t, cond, [0])[0] - first).square().mean((0, 1))
    assert (
        changed.argmax()
        == changed.new_zeros(4, 4, 4).index_put((*torch.tensor([[2], [1], [3]]),), torch.tensor(1.0)).argmax()
    )


def test_clean_latents_are_read_from_a_velocity_at_every_time_pure_noise_among_them(inputs):
    xt, t, cond = inputs
    x0, eps = torch.randn(2, *xt.shape, generator=torch.Generator().manual_seed(2))

    class Exact(MotionDenoiser):
        def forward(self, xt, t, cond):
            alpha, sigma = (spread(f(t * torch.pi / 2), xt) for f in (torch.cos, torch.sin))
            return alpha * eps - sigma * x0

    denoiser = Exact(build_transformer(channels=8, num_layers=1, num_heads=1, head_dim=16))
    noised = add_noise(denoiser.schedule, x0, eps, spread(t, x0))
    torch.testing.assert_close(denoiser.x0(noised, t, cond), x0, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(noised[2], eps[2], atol=1e-6, rtol=0)  # no signal is left at t = 1
