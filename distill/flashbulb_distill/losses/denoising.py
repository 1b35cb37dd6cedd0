"""Denoising losses, as functions of estimates."""

from torch import Tensor

from ..core.schedule import Prediction


def denoising_loss(
    prediction: Prediction, x0_hat: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Return the mean squared error of what a network predicts, by which its teacher was trained.

    eps: |x0_hat - x0|^2 alpha^2 / sigma^2; v, flow and the demo teachers' x0: see `velocity_loss`.

    Args:
        x0_hat: [b, ...] the estimate.   x0: [b, ...] the target.   alpha, sigma: [b] the shares of data and noise.
    Returns:
        [] mean over everything.
    Source: Ho et al. 2020 (arXiv 2006.11239), equation 14, of eps.
    """
    if prediction == "eps":
        share = alpha.reshape(-1, *[1] * (x0.ndim - 1))
        x0_hat, x0 = share * x0_hat, share * x0
    return velocity_loss(x0_hat, x0, sigma)


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
