"""A student for points in the plane: the network that is trained against the mixture teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.schedule import Schedule
from ..teachers.denoiser import Condition, Denoiser
from .heads import time_features, timed_layers


class PointDenoiser(Denoiser):
    """Predict x0 of latents [b, channels, 1, 1] by three hidden layers; the condition is ignored."""

    prediction = "x0"
    schedule: Schedule = "rectified-flow"

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.body = timed_layers(channels, width, channels)

    def forward(self, xt: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the estimate, the shape of xt."""
        out: Tensor = self.body(torch.cat([xt.flatten(1), time_features(t)], dim=1))
        return out.reshape(xt.shape)

    def features(self, xt: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]) -> list[Tensor]:
        """Return no features: it is never a discriminator's backbone."""
        if taps:
            raise ValueError(f"a point denoiser has no blocks to tap, got taps {tuple(taps)}")
        return []
