"""The video demo's autoencoder: principal components of patches of 4 frames x 8 x 8 pixels, closed form both ways."""

from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .patch_codec import half_whitened


class ClipCodec(ModelMixin, ConfigMixin):
    """Encode clips [b, 3, f, h, w] in [-1, 1] as latents [b, channels, f/span, h/patch, w/patch], and back."""

    @register_to_config
    def __init__(self, channels: int = 128, patch: int = 8, span: int = 4) -> None:
        super().__init__()
        self.size = (span, patch, patch)
        self.analysis = nn.Conv3d(3, channels, self.size, stride=self.size)
        self.synthesis = nn.ConvTranspose3d(channels, 3, self.size, stride=self.size)

    def encode(self, clips: Tensor) -> Tensor:
        """Return the latents of clips; overall standard deviation 1 on the data that the codec was fitted to."""
        return cast(Tensor, self.analysis(clips))

    def decode(self, latents: Tensor) -> Tensor:
        """Return the clips of latents, near [-1, 1], not clamped."""
        return cast(Tensor, self.synthesis(latents))

    def forward(self, clips: Tensor) -> Tensor:
        """Return the round trip of clips."""
        return self.decode(self.encode(clips))


@torch.no_grad()
def fit_clip_codec(codec: ClipCodec, clips: Tensor) -> None:
    """Set a codec to the leading principal components of the patches of `clips` [n, 3, frames, h, w]."""
    span, patch, _ = codec.size
    n, _, frames, height, width = clips.shape
    blocks = clips.reshape(n, 3, frames // span, span, height // patch, patch, width // patch, patch)
    columns = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, 3 * span * patch * patch).double()
    forward, backward, centre = half_whitened(columns, codec.config["channels"])
    assert codec.analysis.bias is not None and codec.synthesis.bias is not None
    codec.analysis.weight.copy_(forward.reshape(-1, 3, *codec.size))
    codec.analysis.bias.copy_(-forward @ centre.repeat_interleave(span * patch * patch))
    codec.synthesis.weight.copy_(backward.reshape(-1, 3, *codec.size))
    codec.synthesis.bias.copy_(centre)


def clips_to_pixels(clips: Tensor) -> Tensor:
    """Turn uint8 [n, frames, h, w, 3] clips into float pixels [n, 3, frames, h, w] in [-1, 1]."""
    return clips.movedim(-1, 1).float() / 127.5 - 1
