"""SD3 and SD3.5: an MMDiT under rectified flow. Times are told as t * 1000; the velocity is eps - x0.

Source: Esser et al. 2024, arXiv 2403.03206.
"""

from collections.abc import Sequence
from typing import Any, cast

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from ..core.schedule import Prediction
from .denoiser import Condition, Denoiser, bfloat16


class Sd3Denoiser(Denoiser):
    """An SD3Transformer2DModel; computes in bfloat16 where asked to.

    Args:
        shift: of the teacher's sampling times (3 in SD3 and SD3.5).
        bf16: autocast float32 weights; a network whose weights are bfloat16 needs none.
    """

    prediction: Prediction = "flow"
    schedule = "rectified-flow"

    def __init__(self, transformer: SD3Transformer2DModel, *, shift: float = 1.0, bf16: bool = False) -> None:
        super().__init__()
        self.transformer = transformer
        self.shift = shift
        self.bf16 = bf16

    def predict(self, xt: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """Return the network's output, float32 like xt [b, c, h, w]."""
        dtype = self.transformer.dtype
        with bfloat16(xt, enabled=self.bf16):
            out = self.transformer(
                hidden_states=xt.to(dtype),
                timestep=timestep,
                encoder_hidden_states=cond.tokens.to(dtype),
                pooled_projections=cond.pooled.to(dtype),
                return_dict=False,
            )[0]
        return cast(Tensor, out.float())

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Return the joint transformer blocks."""
        return list(self.transformer.transformer_blocks)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the number of channels of each block's features."""
        return (int(self.transformer.inner_dim),) * len(self.blocks)

    def feature_map(self, output: Any, xt: Tensor) -> Tensor:
        """Read a block's (text tokens, image tokens) as a map [b, width, h / patch, w / patch]."""
        patch = self.transformer.config.patch_size
        height, width = xt.shape[-2] // patch, xt.shape[-1] // patch
        tokens: Tensor = output[1]
        return tokens.transpose(1, 2).reshape(len(xt), -1, height, width)
