"""Losses against hand-made numbers."""

import pytest
import torch

from flashbulb_distill.losses import discriminator_hinge, generator_hinge, velocity_loss


def test_blind_discriminator_pays_two_and_a_perfect_one_nothing():
    zero, one = torch.zeros(4, 3), torch.ones(4, 3)
    assert discriminator_hinge(zero, zero).item() == 2
    assert discriminator_hinge(one, -one).item() == 0
    assert discriminator_hinge(-one, one).item() == 4


def test_saturated_logits_take_no_gradient():
    real = torch.tensor([[2.0, 0.5]], requires_grad=True)
    discriminator_hinge(real, torch.full((1, 2), -3.0)).backward()
    assert real.grad is not None
    assert real.grad.tolist() == [[0.0, -0.5]]


def test_logits_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        discriminator_hinge(torch.zeros(4, 3), torch.zeros(4, 2))


def test_generator_is_paid_by_the_mean_logit():
    assert generator_hinge(torch.tensor([[1.0, 3.0]])).item() == -2


def test_velocity_loss_is_the_velocitys_error():
    x0, eps, guess = torch.randn(3, 8, 2, 2, 2).unbind(0)
    t = torch.linspace(0.2, 1, 8)
    at = t[:, None, None, None]
    xt = (1 - at) * x0 + at * eps
    expected = ((xt - guess) / at - (eps - x0)).square().mean()
    torch.testing.assert_close(velocity_loss(guess, x0, t), expected)


def test_velocity_loss_is_the_error_of_v_where_the_variance_is_preserved():
    x0, eps, guess = torch.randn(3, 8, 2, 2, 2, 2).unbind(0)
    angle = torch.linspace(0.2, 1, 8) * torch.pi / 2
    alpha, sigma = (f(angle)[:, None, None, None, None] for f in (torch.cos, torch.sin))
    xt = alpha * x0 + sigma * eps
    v, said = ((alpha * xt - estimate) / sigma for estimate in (x0, guess))
    torch.testing.assert_close(v, alpha * eps - sigma * x0, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(velocity_loss(guess, x0, angle.sin()), (said - v).square().mean())
