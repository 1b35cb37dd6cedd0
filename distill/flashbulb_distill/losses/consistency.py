"""The consistency loss of LCM, as a function of estimates."""

from torch import Tensor


def pseudo_huber(x0_hat: Tensor, target: Tensor, *, c: float = 1e-3) -> Tensor:
    """Return the mean of sqrt(d^2 + c^2) - c with d = x0_hat - target: squared near 0, absolute far from it.

    Args:
        x0_hat: [b, ...] the student's estimate at t.   target: [b, ...] the target network's at s < t, detached.
        c: where one becomes the other.
    Returns:
        [] mean over everything.
    Source: Luo et al. 2023 (LCM, arXiv 2310.04378), equation 10 with the Huber distance; Song and Dhariwal 2023 (arXiv
    2310.14189), section 3.3.
    """
    return ((x0_hat - target).square() + c * c).sqrt().mean() - c
