"""The non-saturating GAN losses of DMD2, as functions of logits [b, n] like those of the hinge."""

import torch.nn.functional as F
from torch import Tensor


def discriminator_softplus(real: Tensor, fake: Tensor) -> Tensor:
    """Return the mean of softplus(-real) + softplus(fake): minus the log-likelihood of telling them apart.

    Args:
        real, fake: [b, n] logits; the generator is detached by the caller.
    Returns:
        [] the mean over samples and places; 2 log 2 = 1.386 where the discriminator says 0 everywhere.
    Raises:
        ValueError: the shapes differ.
    Source: Goodfellow et al. 2014 (arXiv 1406.2661), as in Yin et al. 2024 (DMD2, arXiv 2405.14867), section 4.3.
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"expected real and fake logits of one shape, got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_softplus(fake: Tensor) -> Tensor:
    """Return the mean of softplus(-fake): minus the log of being taken for real. Source: as above."""
    return F.softplus(-fake).mean()
