"""The denoising loss that trains the fake score, as a function of estimates."""

from torch import Tensor


def velocity_loss(x0_hat: Tensor, x0: Tensor, sigma: Tensor, *, floor: float = 0.1) -> Tensor:
    """Return the mean squared error of the velocity, |x0_hat - x0|^2 / sigma^2.

    Under rectified flow (sigma = t) that is the error of eps - x0, under a variance-preserving schedule that of
    v = alpha eps - sigma x0 (Salimans and Ho 2022, arXiv 2202.00512).

    Args:
        x0_hat: [b, ...] the estimate.   x0: [b, ...] the target.   sigma: [b] the noise's share, in (0, 1].
        floor: sigma below it counts as this, since the weight has a pole at 0.
    Returns:
        [] mean over everything. The demo teachers were trained on the same.
    """
    at = sigma.clamp(min=floor).reshape(-1, *[1] * (x0.ndim - 1))
    return ((x0_hat - x0) / at).square().mean()
