"""The VAEs of the families: pixels in [-1, 1] to latents of about unit variance, and back."""

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX
from torch import Tensor, nn

from ..bundle import Latent
from ..errors import UsageError


class VaeCodec(nn.Module):
    """latents = (what the VAE's encoder says - shift) * scaling. Pictures [b, 3, h, w], videos [b, 3, f, h, w].

    Args:
        vae: kept as it is; its configuration holds scaling and shift.
    Raises:
        UsageError: the VAE normalises each channel on its own, which no bundle can say.
    """

    def __init__(self, vae: AutoencoderKL | AutoencoderKLCogVideoX) -> None:
        super().__init__()
        config = vae.config
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise UsageError(
                "expected a VAE with one scaling and shift, got latents_mean or latents_std; use the family's own VAE"
            )
        self.vae = vae
        self.scaling = float(config.scaling_factor)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.channels = int(config.latent_channels)
        self.is_video = isinstance(vae, AutoencoderKLCogVideoX)
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.frame_downscale = int(config.temporal_compression_ratio) if self.is_video else 1

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the latents [b, c, ...] of pixels [b, 3, ...]: the mode, or a sample where unit noise is given."""
        posterior: Any = self._within_memory(self.vae.encode, pixels).latent_dist
        raw = posterior.mode() if noise is None else posterior.mean + posterior.std * noise
        return cast(Tensor, (raw - self.shift) * self.scaling)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels of latents, about [-1, 1] and not clamped; gradients pass through."""
        return cast(Tensor, self._within_memory(self.vae.decode, latents / self.scaling + self.shift).sample)

    def _within_memory(self, compute: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Compute x whole; of a clip that does not fit, and is looked at only, in tiles blended at their seams.

        Training has no part in it: it sees no clip's pixels. At 49 x 480 x 720 the whole takes 30 GiB, a tile 8.
        """
        try:
            return compute(x)
        except torch.OutOfMemoryError:
            if not self.is_video or torch.is_grad_enabled():
                raise
        self.vae.enable_tiling()  # only here, when the error and all that its frames hold are gone
        try:
            return compute(x)
        finally:
            self.vae.disable_tiling()

    @property
    def latent(self) -> Latent:
        """How the latents relate to pixels."""
        return Latent(
            channels=self.channels,
            downscale=self.downscale,
            frame_downscale=self.frame_downscale,
            scaling=self.scaling,
            shift=self.shift,
        )

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """Return (c, h, w) of a picture or (c, f, h, w) of a video of that size in pixels."""
        plane = (height // self.downscale, width // self.downscale)
        if not self.is_video:
            return (self.channels, *plane)
        return (self.channels, (frames - 1) // self.frame_downscale + 1, *plane)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode and decode."""
        return self.decode(self.encode(pixels))


def freeze(module: nn.Module) -> nn.Module:
    """Return the module without gradients and in evaluation mode."""
    return module.requires_grad_(False).eval()


@torch.no_grad()
def round_trip_error(codec: VaeCodec, pixels: Tensor) -> float:
    """Return the root mean square of decode(encode(pixels)) - pixels, of pixels in [-1, 1]."""
    return float((codec(pixels) - pixels).square().mean().sqrt())
