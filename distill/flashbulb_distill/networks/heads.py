"""Discriminator heads: small trainable readers of frozen feature maps."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

TIME_FEATURES = 16

# What of a sample a loss sees as one logit: each place of each head, each head's mean, the mean of all heads.
Combination = Literal["places", "heads", "sample"]


def time_features(t: Tensor) -> Tensor:
    """Return sines and cosines of times [b] in [0, 1] at 8 octaves, [b, 16]."""
    angles = t[:, None] * (math.pi / 2) * 2 ** torch.arange(TIME_FEATURES // 2, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def timed_layers(channels: int, width: int, out: int) -> nn.Sequential:
    """Make three hidden layers that read a vector [b, channels] beside its time features, into [b, out]."""
    return nn.Sequential(
        nn.Linear(channels + TIME_FEATURES, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, out),
    )


class Head(nn.Module):
    """Read one feature map [b, channels, (f,) h, w] at times [b] into logits [b, places].

    Each sample's map is normalised as a whole first, so that taps of any scale learn at one learning rate.

    Args:
        axes: of a place: 2 of a picture, 3 of a video.
    """

    def __init__(self, channels: int, width: int = 64, *, axes: int = 2) -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.scale = nn.GroupNorm(1, channels)
        self.enter = convolution(channels, width, 3, padding=1)
        self.time = nn.Linear(TIME_FEATURES, width)
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            convolution(width, width, 4, stride=2, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            convolution(width, 1, 1),
        )

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """Return one logit a place."""
        # GroupNorm's backward pass crashes on channels-last views (torch 2.13, CPU), which networks do return.
        features = features.contiguous()
        time = self.time(time_features(t))
        x = self.enter(self.scale(features)) + time.reshape(*time.shape, *[1] * (features.ndim - 2))
        logits: Tensor = self.body(x)
        return logits.flatten(1)


class VectorHead(nn.Module):
    """Read a vector [b, width] at times [b] into one logit, for latents too small for convolutions."""

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.body = timed_layers(channels, width, 1)

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """Return the logit [b, 1]."""
        logit: Tensor = self.body(torch.cat([features.flatten(1), time_features(t)], dim=1))
        return logit


class Heads(nn.ModuleList):
    """One head for each map; their logits side by side, or averaged before a loss sees them.

    A loss is the mean over the logits that it is given, so "heads" is the mean of the heads' own losses, "sample" the
    loss of the mean logit, and "places" lets each head's map be right in one place and wrong in another.
    """

    def __init__(self, heads: Sequence[nn.Module], combine: Combination = "places") -> None:
        super().__init__(heads)
        self.combine = combine

    def forward(self, maps: Sequence[Tensor], t: Tensor) -> Tensor:
        """Return logits [b, places of all heads], [b, heads] or [b, 1]."""
        logits = [head(features, t) for head, features in zip(self, maps, strict=True)]
        if self.combine == "places":
            return torch.cat(logits, dim=1)
        means = torch.stack([each.mean(1) for each in logits], dim=1)
        return means if self.combine == "heads" else means.mean(1, keepdim=True)
