"""The video demo's family: CogVideoX at a small size, on clip latents, with a continuous schedule."""

from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel

from .clip_codec import ClipCodec
from .cogvideox import CogVideoXDenoiser
from .demo import DemoTeacher, load_demo


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


def load_motion_teacher(
    folder: Path, *, bf16: bool = False, device: torch.device | None = None
) -> MotionTeacher:
    """Load a teacher of emoji in motion, frozen, onto a device; see `load_demo`."""
    return load_demo(
        folder,
        expected="a teacher of emoji in motion",
        example="examples/emoji_motion/teacher",
        network=MotionDenoiser,
        transformer=CogVideoXTransformer3DModel,
        codec=ClipCodec,
        latent_shape=lambda network, codec: (
            network["in_channels"],
            network["sample_frames"] // codec["span"],
            network["sample_height"],
            network["sample_width"],
        ),
        bf16=bf16,
        device=device,
    )
