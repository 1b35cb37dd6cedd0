"""What keeps a discriminator from growing steep around the real samples."""

from torch import Tensor


def approximate_r1(logits: Tensor, shaken: Tensor) -> Tensor:
    """Return the mean squared change of the real samples' logits [b, n] when small noise is added to them.

    With noise of standard deviation s it is s^2 |grad D|^2 to first order, the R1 penalty (Mescheder et al. 2018, arXiv
    1801.04406) without its second derivatives, which attention kernels do not have.

    Args:
        logits: of real samples.   shaken: of the same samples plus noise.
    Source: Lin et al. 2025 (Seaweed-APT, arXiv 2501.08316), section 3.3.
    """
    return (logits - shaken).square().mean()
