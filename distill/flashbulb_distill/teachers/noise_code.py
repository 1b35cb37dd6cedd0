"""What lets a student's noise choose among the variants of a prompt: one number of it, told beside the text.

The noise of a picture decides its style too, but by no rule that a one-step network finds: between two styles it draws
their mean. A number that it is given instead is easily followed, see `train.variety`.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


def place_of(noise: Tensor) -> Tensor:
    """Return where each noise [b, ...] lies among all by its sum, evenly distributed in [0, 1]: float32 [b]."""
    values = noise.float().flatten(1)
    return 0.5 * (1 + torch.erf(values.sum(1) / math.sqrt(2 * values.shape[1])))


class NoiseCode(ModelMixin, ConfigMixin):
    """Read a noise's place as what is added to the prompt's pooled embedding; nothing until it is trained."""

    @register_to_config
    def __init__(self, width: int, hidden: int = 128, waves: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(waves, hidden)
        self.last = nn.Linear(hidden, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, noise: Tensor) -> Tensor:
        """Return what is added for noises [b, ...]: float32 [b, width]."""
        frequencies = math.pi * torch.arange(self.first.in_features, device=noise.device, dtype=torch.float32)
        waves = math.sqrt(2) * torch.cos(place_of(noise)[:, None] * frequencies)
        return cast(Tensor, self.last(F.silu(self.first(waves))))
