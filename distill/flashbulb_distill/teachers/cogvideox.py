"""CogVideoX 1.0 (2B and 5B): a video transformer that predicts v on 1000 noise levels, the last of them pure noise.

Timestep k is time (k + 1) / 1000. 2B adds sines of the place to its tokens, 5B rotates queries and keys.
Source: Yang et al. 2024, arXiv 2408.06072.
"""

from collections.abc import Sequence
from typing import Any, cast

from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from ..core.schedule import Prediction, Schedule
from ..errors import UsageError
from .denoiser import Condition, Denoiser, bfloat16


class CogVideoXDenoiser(Denoiser):
    """A CogVideoXTransformer3DModel on latents [b, c, f, h, w]; computes in bfloat16 where asked to.

    Args:
        bf16: autocast float32 weights; a network whose weights are bfloat16 needs none.
    Raises:
        UsageError: a CogVideoX 1.5 network (patches over time), which is not supported.
    """

    timestep_offset = -1.0

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        schedule: Schedule,
        *,
        prediction: Prediction = "v",
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if transformer.config.patch_size_t is not None:
            raise UsageError(
                f"expected a CogVideoX 1.0 network, got patches of {transformer.config.patch_size_t} frames; "
                "use CogVideoX-2b or CogVideoX-5b"
            )
        self.transformer = transformer
        self.schedule = schedule
        self.prediction = prediction
        self.bf16 = bf16

    def predict(self, xt: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """Return the network's output, float32 like xt [b, c, f, h, w]."""
        dtype = self.transformer.dtype
        with bfloat16(xt, enabled=self.bf16):
            out = self.transformer(
                hidden_states=xt.to(dtype).transpose(1, 2),
                encoder_hidden_states=cond.tokens.to(dtype),
                timestep=timestep,
                image_rotary_emb=rotary(self.transformer, xt),
                return_dict=False,
            )[0]
        return cast(Tensor, out.float().transpose(1, 2))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Return the transformer blocks."""
        return list(self.transformer.transformer_blocks)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the number of channels of each block's features."""
        config = self.transformer.config
        return (config.num_attention_heads * config.attention_head_dim,) * len(self.blocks)

    def feature_map(self, output: Any, xt: Tensor) -> Tensor:
        """Read a block's (video tokens, text tokens) as a map [b, width, f, h / patch, w / patch]."""
        patch = self.transformer.config.patch_size
        frames, height, width = xt.shape[-3], xt.shape[-2] // patch, xt.shape[-1] // patch
        tokens: Tensor = output[0]
        return tokens.transpose(1, 2).reshape(len(xt), -1, frames, height, width)


def rotary(transformer: CogVideoXTransformer3DModel, xt: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return cosines and sines for the places of latents [b, c, f, h, w]; None for a network that uses none.

    The grid is that of the size which the network was trained at, cropped to the latents' aspect.
    """
    config = transformer.config
    if not config.use_rotary_positional_embeddings:
        return None
    patch = config.patch_size
    grid = (xt.shape[-2] // patch, xt.shape[-1] // patch)
    crop = get_resize_crop_region_for_grid(grid, config.sample_width // patch, config.sample_height // patch)
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        crops_coords=crop,
        grid_size=grid,
        temporal_size=xt.shape[-3],
        device=xt.device,
    )
    return cos, sin
