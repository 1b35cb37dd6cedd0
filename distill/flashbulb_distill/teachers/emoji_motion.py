"""The video demo's family: CogVideoX at a small size, on clip latents, with a continuous schedule."""

from pathlib import Path
from typing import cast

import torch
from diffusers import CogVideoXTransformer3DModel

from .clip_codec import ClipCodec
from .codec import freeze
from .cogvideox import CogVideoXDenoiser
from .demo import DemoTeacher, check_folder
from .text import load_text_encoder, load_tokenizer


class MotionDenoiser(CogVideoXDenoiser):
    """A CogVideoXTransformer3DModel that predicts v at any time in [0, 1], pure noise at 1 among them."""

    timestep_offset = 0.0  # it was trained on times, not on numbered noise levels

    def __init__(self, transformer: CogVideoXTransformer3DModel, *, bf16: bool = False) -> None:
        super().__init__(transformer, "variance-preserving", bf16=bf16)


MotionTeacher = DemoTeacher[MotionDenoiser, ClipCodec]


def build_transformer(
    *, channels: int, num_layers: int = 4, num_heads: int = 2, head_dim: int = 64
) -> CogVideoXTransformer3DModel:
    """Build an untrained network of the family: 4 x 4 x 4 latent tokens, 14 text tokens; each block is the identity."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=num_heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        time_embed_dim=128,
        text_embed_dim=384,
        num_layers=num_layers,
        patch_size=1,
        sample_width=4,
        sample_height=4,
        sample_frames=16,
        max_text_seq_length=14,
        use_rotary_positional_embeddings=True,
    )
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm2.linear.weight)
    torch.nn.init.zeros_(model.norm_out.linear.weight)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


def load_transformer(folder: Path) -> CogVideoXTransformer3DModel:
    """Load a teacher folder's transformer in float32."""
    model = CogVideoXTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=torch.float32, local_files_only=True
    )
    return cast(CogVideoXTransformer3DModel, model)


def load_motion_teacher(
    folder: Path, *, bf16: bool = False, device: torch.device | None = None
) -> MotionTeacher:
    """Load a teacher of emoji in motion, frozen, onto a device.

    Raises:
        FileNotFoundError: the folder is not a teacher folder.
    """
    check_folder(folder, "a teacher of emoji in motion", "examples/emoji_motion/teacher")
    codec = ClipCodec.from_pretrained(
        folder, subfolder="codec", torch_dtype=torch.float32, local_files_only=True
    )

    def load(bf16: bool) -> MotionDenoiser:
        return MotionDenoiser(load_transformer(folder), bf16=bf16)

    denoiser = cast(MotionDenoiser, freeze(load(bf16).to(device)))
    config, span = denoiser.transformer.config, codec.config["span"]
    return DemoTeacher(
        folder,
        denoiser,
        cast(ClipCodec, freeze(codec.to(device))),
        load_text_encoder(),
        load_tokenizer(),
        (config.in_channels, config.sample_frames // span, config.sample_height, config.sample_width),
        load,
    )
