"""CogVideoX's positions as functions that can be traced for any size: a graph computes them, no host has to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def rotary_positions(
    head_dim: int, frames: int, grid: tuple[int, int], base: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [frames * h * w, head_dim] of CogVideoX-5B's rotary embedding.

    A grid of another size than the trained `base` is scaled to fit into its middle, as diffusers'
    `get_resize_crop_region_for_grid` does.

    Args:
        frames: latent frames.
        grid, base: patches (height, width) of the latents and of the trained size.
    """
    height, width = (torch.scalar_tensor(side, dtype=torch.float32) for side in grid)
    base_height, base_width = base
    is_tall = height / width > base_height / base_width
    resized = (
        torch.where(is_tall, float(base_height), torch.round(base_width / width * height)),
        torch.where(is_tall, torch.round(base_height / height * width), float(base_width)),
    )
    axes = [(torch.arange(frames, dtype=torch.float32), head_dim // 4)]
    for side, count, full, whole in zip(grid, (height, width), resized, base, strict=True):
        start = torch.round((whole - full) / 2)
        # linspace(start, stop * (n - 1) / n, n), whose only point is `start` when n is 1
        step = ((start + full) * (count - 1) / count - start) / (count - 1).clamp(min=1)
        axes.append((start + torch.arange(side, dtype=torch.float32) * step, head_dim // 8 * 3))
    angles = []
    for axis, (positions, dim) in enumerate(axes):
        frequencies = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        own = torch.outer(positions, frequencies).repeat_interleave(2, dim=1)
        view = [1, 1, 1, dim]
        view[axis] = -1
        angles.append(own.view(view).expand(frames, *grid, dim))
    joined = torch.cat(angles, dim=-1).flatten(0, 2)
    return joined.cos(), joined.sin()


def sinusoidal_positions(embed: Any, height: int, width: int, frames: int) -> Tensor:
    """Return CogVideoX-2B's position embeddings [1, text + f * h * w, d].

    Args:
        embed: diffusers' `CogVideoXPatchEmbed`.
        height, width: of the latents; frames: of the pixels, as diffusers calls it.
    """
    patch = embed.patch_size
    sides = (frames - 1) // embed.temporal_compression_ratio + 1, height // patch, width // patch
    quarter, three_eighths = embed.embed_dim // 4, embed.embed_dim * 3 // 8
    scales = embed.temporal_interpolation_scale, *(embed.spatial_interpolation_scale,) * 2
    parts = []
    for axis, dim in ((0, quarter), (2, three_eighths), (1, three_eighths)):  # time, width, height
        frequencies = 10000 ** (-torch.arange(dim // 2, dtype=torch.float32) / (dim / 2))
        angles = torch.outer(torch.arange(sides[axis], dtype=torch.float32) / scales[axis], frequencies)
        view = [1, 1, 1, dim]
        view[axis] = -1
        parts.append(torch.cat([angles.sin(), angles.cos()], dim=1).view(view).expand(*sides, dim))
    positions = torch.cat(parts, dim=-1).flatten(0, 2)[None]
    return torch.cat([positions.new_zeros(1, embed.max_text_seq_length, embed.embed_dim), positions], dim=1)


@contextmanager
def exportable() -> Iterator[None]:
    """Replace, while this is open, what of CogVideoX a tracer cannot follow: two of diffusers' functions.

    Outside this context diffusers is untouched, so that a parity check compares with its own code.
    """
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
    from diffusers.models.embeddings import CogVideoXPatchEmbed

    def positions(self: Any, height: int, width: int, frames: int, device: object = None) -> Tensor:
        return sinusoidal_positions(self, height, width, frames)

    conv, embed = CogVideoXSafeConv3d.forward, CogVideoXPatchEmbed._get_positional_embeddings
    CogVideoXSafeConv3d.forward = (
        nn.Conv3d.forward
    )  # it splits inputs over 2 GB, no matter of what is computed
    CogVideoXPatchEmbed._get_positional_embeddings = positions  # it writes into a buffer in place
    try:
        yield
    finally:
        CogVideoXSafeConv3d.forward = conv
        CogVideoXPatchEmbed._get_positional_embeddings = embed
