"""A teacher whose score is known: a mixture of Gaussians in the plane, one mixture a condition.

Under the schedule xt = alpha x0 + sigma eps a mixture stays a mixture, so E[x0 | xt] has a closed form. On it the
methods can be tested in seconds, against exact answers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.schedule import Schedule, alpha_sigma
from .denoiser import Condition, Denoiser, spread


class MixtureDenoiser(Denoiser):
    """Predict E[x0 | xt] exactly for equal isotropic Gaussians at `centres`; latents are [b, 2, 1, 1].

    The condition is ignored: one mixture serves every prompt.
    """

    prediction = "x0"
    schedule: Schedule = "rectified-flow"

    def __init__(self, centres: Tensor, std: float) -> None:
        super().__init__()
        self.std = std
        self.register_buffer("centres", centres)  # [modes, 2]

    def forward(self, xt: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the posterior mean of x0, the shape of xt."""
        centres = self.get_buffer("centres")
        alpha, sigma = alpha_sigma(self.schedule, spread(t, xt[..., 0, 0]))  # [b, 1]
        x = xt[..., 0, 0]  # [b, 2]
        variance = alpha**2 * self.std**2 + sigma**2
        gap = x[:, None] - alpha[..., None] * centres  # [b, modes, 2]
        weights = torch.softmax(-gap.square().sum(-1) / (2 * variance), dim=1)  # [b, modes]
        gain = alpha * self.std**2 / variance  # [b, 1]
        means = centres + gain[..., None] * gap
        mean: Tensor = (weights[..., None] * means).sum(1)
        return mean[..., None, None]

    def features(self, xt: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]) -> list[Tensor]:
        """Return no features: an exact score has no blocks."""
        if taps:
            raise ValueError(f"the mixture has no blocks to tap, got taps {tuple(taps)}")
        return []

    def sample(self, noise: Tensor, picks: Tensor) -> Tensor:
        """Return exact samples from unit noise [b, 2, 1, 1] and mode numbers int64 [b]."""
        return self.get_buffer("centres")[picks][..., None, None] + self.std * noise


def ring(num_modes: int, radius: float = 2.0) -> Tensor:
    """Return the centres of modes evenly on a circle, [num_modes, 2]."""
    angles = torch.arange(num_modes) * (2 * torch.pi / num_modes)
    return radius * torch.stack([angles.cos(), angles.sin()], dim=1)
