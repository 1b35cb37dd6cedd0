"""Losses against hand-made numbers."""

import pytest
import torch

from flashbulb_distill.core.schedule import alpha_sigma, to_x0
from flashbulb_distill.losses import (
    approximate_r1,
    denoising_loss,
    discriminator_hinge,
    discriminator_softplus,
    dmd_gradient,
    dmd_loss,
    generator_hinge,
    generator_softplus,
    pseudo_huber,
    velocity_loss,
)


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


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [("eps", "variance-preserving"), ("v", "variance-preserving"), ("flow", "rectified-flow")],
)
def test_denoising_loss_is_the_error_of_what_the_network_says(prediction, schedule):
    generator = torch.Generator().manual_seed(0)
    x0, eps, said = torch.randn(3, 5, 4, generator=generator)
    t = torch.tensor([0.1, 0.3, 0.6, 0.8, 0.97])
    alpha, sigma = alpha_sigma(schedule, t)
    a, s = alpha[:, None], sigma[:, None]
    right = {"eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[prediction]
    x0_hat = to_x0(prediction, schedule, said, a * x0 + s * eps, t[:, None])
    loss = denoising_loss(prediction, x0_hat, x0, alpha, sigma)
    torch.testing.assert_close(loss, (said - right).square().mean())


def test_velocity_loss_is_the_error_of_v_where_the_variance_is_preserved():
    x0, eps, guess = torch.randn(3, 8, 2, 2, 2, 2).unbind(0)
    angle = torch.linspace(0.2, 1, 8) * torch.pi / 2
    alpha, sigma = (f(angle)[:, None, None, None, None] for f in (torch.cos, torch.sin))
    xt = alpha * x0 + sigma * eps
    v, said = ((alpha * xt - estimate) / sigma for estimate in (x0, guess))
    torch.testing.assert_close(v, alpha * eps - sigma * x0, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(velocity_loss(guess, x0, angle.sin()), (said - v).square().mean())


def gaussian_x0(xt, t, mean, std):
    """Return E[x0 | xt] under rectified flow for x0 ~ N(mean, std^2), in closed form."""
    alpha, sigma = 1 - t, t
    variance = alpha**2 * std**2 + sigma**2
    return mean + alpha * std**2 / variance * (xt - alpha * mean)


def test_dmd_gradient_is_the_difference_of_the_noised_scores():
    """Against the scores that autograd takes of two Gaussian densities."""
    torch.manual_seed(0)
    t, x0 = 0.4, torch.randn(5, 3).double()
    xt = ((1 - t) * x0 + t * torch.randn(5, 3)).requires_grad_()
    fake, real = (0.7, 0.5), (-0.2, 1.3)

    def score(mean, std):
        noised = torch.distributions.Normal((1 - t) * mean, (((1 - t) * std) ** 2 + t**2) ** 0.5)
        return torch.autograd.grad(noised.log_prob(xt).sum(), xt)[0]

    x0_fake, x0_real = (gaussian_x0(xt.detach(), t, *moments) for moments in (fake, real))
    expected = (score(*fake) - score(*real)) * t**2 / (1 - t)
    expected = expected / (x0 - x0_real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(dmd_gradient(x0, x0_fake, x0_real), expected)


def test_dmd_descends_the_divergence_of_two_gaussians():
    """Both derivatives of KL, by mean and by std, from 400,000 samples without the weight."""
    torch.manual_seed(0)
    t, (m, s), (m_real, s_real) = 0.5, (0.8, 0.6), (-0.3, 1.1)
    alpha, sigma = 1 - t, t
    eps = torch.randn(400_000, 1).double()
    x0 = m + s * eps
    xt = alpha * x0 + sigma * torch.randn(400_000, 1)
    x0_fake, x0_real = gaussian_x0(xt, t, m, s), gaussian_x0(xt, t, m_real, s_real)
    weight = (x0 - x0_real).abs()  # the normaliser, taken out again; one value a sample here
    direction = dmd_gradient(x0, x0_fake, x0_real) * weight * alpha / sigma**2  # s_fake - s_real
    var_fake, var_real = (alpha**2 * v**2 + sigma**2 for v in (s, s_real))
    by_mean = (direction * alpha).mean().item()
    by_std = (direction * alpha * eps).mean().item()
    assert by_mean == pytest.approx(alpha**2 * (m - m_real) / var_real, rel=0.02)
    assert by_std == pytest.approx(alpha**2 * s * (1 / var_real - 1 / var_fake), rel=0.02)


def test_dmd_gradient_is_nought_where_both_scores_agree_and_where_nothing_is_left_to_learn():
    x0, guess = torch.randn(2, 4, 3, 2, 2)
    assert not dmd_gradient(x0, guess, guess).any()
    assert not dmd_gradient(x0, x0, x0).any()


def test_dmd_loss_hands_the_gradient_to_the_samples():
    x0, gradient = torch.randn(2, 4, 3)
    x0.requires_grad_()
    dmd_loss(x0, gradient).backward()
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, gradient / 12)


def test_softplus_losses_are_the_cross_entropies_of_telling_real_from_fake():
    real, fake = torch.randn(2, 6, 3)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = entropy(real, torch.ones(6, 3)) + entropy(fake, torch.zeros(6, 3))
    torch.testing.assert_close(discriminator_softplus(real, fake), expected)
    torch.testing.assert_close(generator_softplus(fake), entropy(fake, torch.ones(6, 3)))
    with pytest.raises(ValueError, match="one shape"):
        discriminator_softplus(real, fake[:2])


def test_the_approximate_penalty_is_the_squared_slope_times_the_noises_variance():
    torch.manual_seed(0)
    slope, std = torch.tensor([3.0, -4.0]), 1e-2
    x = torch.randn(200_000, 2).double()

    def logits(at):
        return (at @ slope.double())[:, None]

    penalty = approximate_r1(logits(x), logits(x + std * torch.randn_like(x)))
    assert penalty.item() == pytest.approx(25 * std**2, rel=0.02)


def test_pseudo_huber_is_squared_near_nought_and_absolute_far_from_it():
    c, small, large = 1e-2, torch.tensor([1e-4, -2e-4]), torch.tensor([5.0, -3.0])
    assert pseudo_huber(small, torch.zeros(2), c=c).item() == pytest.approx(2.5e-8 / (2 * c), rel=0.05)
    assert pseudo_huber(large, torch.zeros(2), c=c).item() == pytest.approx(4.0 - c, rel=1e-3)
