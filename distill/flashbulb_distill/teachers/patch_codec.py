"""The demo family's autoencoder: principal components of 8 x 8 patches, and a small de-blocking decoder.

    latents = W (patch - mean)          one strided convolution, closed form
    pixels  = base + deblock(base, latents)   base = W^+ latents + mean, the transposed convolution

The linear part is exact on its own; the convolutions after it remove the 8 x 8 grid and mend latents that a
denoiser got slightly wrong.
"""

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class PatchCodec(ModelMixin, ConfigMixin):
    """Encode pixels [b, 3, h, w] in [-1, 1] as latents [b, channels, h/patch, w/patch], and back."""

    @register_to_config
    def __init__(self, channels: int = 64, patch: int = 8, width: int = 48) -> None:
        super().__init__()
        self.patch = patch
        self.analysis = nn.Conv2d(3, channels, patch, stride=patch)
        self.synthesis = nn.ConvTranspose2d(channels, 3, patch, stride=patch)
        self.lift = nn.ConvTranspose2d(channels, 16, patch // 2, stride=patch // 2)
        self.deblock = nn.Sequential(
            nn.Conv2d(12 + 16, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 12, 3, padding=1),
        )
        nn.init.zeros_(cast(Tensor, self.deblock[-1].weight))
        nn.init.zeros_(cast(Tensor, self.deblock[-1].bias))

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the latents of pixels; overall standard deviation 1 on the data that the codec was fitted to."""
        return cast(Tensor, self.analysis(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels of latents, near [-1, 1], not clamped."""
        base = self.synthesis(latents)
        features = torch.cat([F.pixel_unshuffle(base, 2), self.lift(latents)], dim=1)
        return cast(Tensor, base + F.pixel_shuffle(self.deblock(features), 2))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the round trip of pixels."""
        return self.decode(self.encode(pixels))


@torch.no_grad()
def fit_linear(codec: PatchCodec, pixels: Tensor) -> None:
    """Set the linear part to the leading principal components of the patches of `pixels` [n, 3, h, w].

    See `half_whitened` for their scale.
    """
    patch, channels = codec.patch, codec.config["channels"]
    columns = F.pixel_unshuffle(pixels, patch).movedim(1, -1).reshape(-1, 3 * patch * patch).double()
    forward, backward, centre = half_whitened(columns, channels)
    assert codec.analysis.bias is not None and codec.synthesis.bias is not None
    codec.analysis.weight.copy_(forward.reshape(channels, 3, patch, patch))
    codec.analysis.bias.copy_(-forward @ centre.repeat_interleave(patch * patch))
    codec.synthesis.weight.copy_(backward.reshape(channels, 3, patch, patch))
    codec.synthesis.bias.copy_(centre)


def half_whitened(columns: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading principal components of patches as matrices there and back, and the mean of each colour.

    Component i is divided by its variance to the power 1/4 (half-whitening: the network sees fine detail without
    its noise drowning the rest), then all by one number so that the latents have standard deviation 1.

    Args:
        columns: float64 [patches, 3 * values], colour by colour.
    Returns:
        forward and backward [channels, 3 * values], and one number a colour channel [3], so that the transposed
        convolution's bias can add it back exactly.
    """
    centre = columns.mean(0).reshape(3, -1).mean(1)
    centred = columns - columns.mean(0)
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    variances, vectors = variances.flip(0)[:channels], vectors.flip(1)[:, :channels]
    scale = variances.clamp(min=1e-6 * float(variances[0])).pow(-0.25)
    scale = scale / (variances * scale.square()).mean().sqrt()
    return (vectors * scale).T, (vectors / scale).T, centre


def to_pixels(images: Tensor) -> Tensor:
    """Turn uint8 [n, h, w, 3] pictures into float pixels [n, 3, h, w] in [-1, 1]."""
    return images.movedim(-1, 1).float() / 127.5 - 1
