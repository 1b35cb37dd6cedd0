"""DMD: the gradient of a KL divergence between two noised distributions, from the estimates of two score networks."""

import torch
from torch import Tensor


def dmd_gradient(x0: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """Return the direction in which KL(student | teacher) of the noised samples grows, one unit of length a sample.

        g = (x0_fake - x0_real) / mean |x0 - x0_real|

    Since score = (alpha x0_hat - xt) / sigma^2, the numerator is (s_fake - s_real) sigma^2 / alpha; the denominator is
    the mean over a sample's own values, so that every noise level has a say of about one.

    Args:
        x0: [b, ...] the student's samples.   x0_fake, x0_real: [b, ...] both networks' estimates from one noised copy.
    Returns:
        [b, ...] without a gradient; 0 where both estimates and the sample agree.
    Source: Yin et al. 2023 (DMD, arXiv 2311.18828), equations 7 and 8, in terms of x0 as in 2405.14867.
    """
    with torch.no_grad():
        scale = (x0 - x0_real).abs().flatten(1).mean(1).reshape(-1, *[1] * (x0.ndim - 1))
        gradient: Tensor = torch.nan_to_num((x0_fake - x0_real) / scale)
        return gradient


def dmd_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """Return a loss whose gradient in x0 [b, ...] is `gradient` over the number of values: half (x0 - sg(x0 - g))^2.

    Returns:
        [] mean over everything; its value says nothing but the gradient's size.
    """
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()
