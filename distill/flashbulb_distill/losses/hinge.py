"""The hinge losses of ADM and ADP, as functions of logits. Logits are [b, n]: n places of all heads.

Each head's loss is the mean over its places; heads arrive already joined, with equal numbers of places or not.
"""

import torch.nn.functional as F
from torch import Tensor


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Push real logits above +1 and fake logits below -1: mean of max(0, 1 - real) + max(0, 1 + fake).

    Args:
        real: [b, n] logits of real inputs.
        fake: [b, n] logits of generated inputs, the generator detached by the caller.
    Returns:
        [] the mean over samples and places; 2 where the discriminator says 0 everywhere.
    Raises:
        ValueError: the shapes differ.
    Source: arXiv 2507.18569, L_D of ADM and each term of ADP's.
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"expected real and fake logits of one shape, got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_hinge(fake: Tensor) -> Tensor:
    """Raise the logits of generated inputs [b, n]: minus their mean. Source: arXiv 2507.18569, L_G."""
    return -fake.mean()
