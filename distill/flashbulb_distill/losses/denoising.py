"""The denoising loss that trains the fake score, as a function of estimates."""

from torch import Tensor


def velocity_loss(x0_hat: Tensor, x0: Tensor, t: Tensor, *, floor: float = 0.1) -> Tensor:
    """Return the mean squared error of the velocity under rectified flow, |x0_hat - x0|^2 / t^2.

    Args:
        x0_hat: [b, ...] the estimate.   x0: [b, ...] the target.   t: [b] in (0, 1].
        floor: t below it counts as this, since the weight has a pole at 0.
    Returns:
        [] mean over everything. The demo teacher was trained on the same.
    """
    at = t.clamp(min=floor).reshape(-1, *[1] * (x0.ndim - 1))
    return ((x0_hat - x0) / at).square().mean()
