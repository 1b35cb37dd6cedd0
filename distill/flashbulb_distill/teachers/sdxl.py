"""SDXL: a UNet that predicts noise (or v) on 1000 variance-preserving noise levels, none of them pure noise.

Timestep k is time (k + 1) / 1000. Besides text the network reads the picture's size and crop; we say: not cropped.
Source: Podell et al. 2023, arXiv 2307.01952.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..core.schedule import Prediction, Schedule
from .denoiser import Condition, Denoiser, bfloat16

PIXELS_PER_LATENT = 8


class SdxlDenoiser(Denoiser):
    """A UNet2DConditionModel with SDXL's added conditions; computes in bfloat16 where asked to.

    Args:
        bf16: autocast float32 weights; a network whose weights are bfloat16 needs none.
    """

    timestep_offset = -1.0

    def __init__(
        self,
        unet: UNet2DConditionModel,
        schedule: Schedule,
        *,
        prediction: Prediction = "eps",
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.prediction = prediction
        self.bf16 = bf16

    def predict(self, xt: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """Return the network's output, float32 like xt [b, 4, h, w]."""
        dtype = self.unet.dtype
        added = {"text_embeds": cond.pooled.to(dtype), "time_ids": time_ids(xt).to(dtype)}
        with bfloat16(xt, enabled=self.bf16):
            out = self.unet(
                xt.to(dtype),
                timestep,
                encoder_hidden_states=cond.tokens.to(dtype),
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        return cast(Tensor, out.float())

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Return the down blocks, the middle and the up blocks."""
        assert self.unet.mid_block is not None
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the number of channels of each block's features."""
        channels = tuple(self.unet.config.block_out_channels)
        return (*channels, channels[-1], *reversed(channels))

    def feature_map(self, output: Any, xt: Tensor) -> Tensor:
        """Return a block's map; down blocks return it beside those that they pass across."""
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def time_ids(xt: Tensor) -> Tensor:
    """Return (height, width, top, left, height, width) in pixels of pictures that were not cropped, float32 [b, 6]."""
    height, width = xt.shape[-2] * PIXELS_PER_LATENT, xt.shape[-1] * PIXELS_PER_LATENT
    sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=xt.device)
    return sizes.expand(len(xt), -1)
