"""The demo family: an SD3 transformer on patch latents that predicts x0, and its folder on disk."""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from .demo import DemoTeacher, load_demo
from .denoiser import Condition
from .noise_code import NoiseCode
from .patch_codec import PatchCodec
from .sd3 import Sd3Denoiser

TIMESTEP_SCALE = 1000.0
NOISE_CODE = "noise_code"  # its folder, beside transformer/


class EmojiDenoiser(Sd3Denoiser):
    """An SD3Transformer2DModel that predicts x0; computes in bfloat16 where asked to.

    Attributes:
        code: of a student whose noise chooses among its prompts' variants; None of others.
    """

    prediction = "x0"

    def __init__(
        self, transformer: SD3Transformer2DModel, *, bf16: bool = False, code: NoiseCode | None = None
    ) -> None:
        super().__init__(transformer, bf16=bf16)
        self.code = code

    def predict(self, xt: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """Return the network's output, float32 like xt [b, c, h, w]."""
        if self.code is not None:
            cond = Condition(cond.tokens, cond.pooled + self.code(xt))
        return super().predict(xt, timestep, cond)


EmojiTeacher = DemoTeacher[EmojiDenoiser, PatchCodec]


def load_emoji_teacher(
    folder: Path, *, bf16: bool = False, device: torch.device | None = None
) -> EmojiTeacher:
    """Load a teacher of the demo family, or a student with its code, frozen, onto a device; see `load_demo`."""

    def network(transformer: SD3Transformer2DModel, *, bf16: bool) -> EmojiDenoiser:
        return EmojiDenoiser(transformer, bf16=bf16, code=_load_code(folder))

    return load_demo(
        folder,
        expected="an emoji teacher",
        example="examples/emoji/teacher",
        network=network,
        transformer=SD3Transformer2DModel,
        codec=PatchCodec,
        latent_shape=lambda network, _: (
            network["in_channels"],
            network["sample_size"],
            network["sample_size"],
        ),
        bf16=bf16,
        device=device,
    )


def is_code(parameter: str) -> bool:
    """Tell whether a parameter of a network, by its name, is of a student's code."""
    return parameter.startswith("code.")


def _load_code(folder: Path) -> NoiseCode | None:
    if not (folder / NOISE_CODE).is_dir():
        return None
    code: NoiseCode = NoiseCode.from_pretrained(
        folder, subfolder=NOISE_CODE, torch_dtype=torch.float32, local_files_only=True
    )
    return code
