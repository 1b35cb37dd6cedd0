"""The shapes that an engine must take: one optimisation profile per picture size of the bundle."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..bundle.engines import Profile

# What each axis of a graph's input stands for. An axis that the graph fixes keeps its number.
AXES: dict[str, tuple[str, ...]] = {
    "latents": ("batch", "channels", "height", "width"),
    "timestep": ("batch",),
    "prompt_embeds": ("batch", "embeddings", "width of embeddings"),
    "pooled_prompt_embeds": ("batch", "width of embeddings"),
    "time_ids": ("batch", "six"),
    "input_ids": ("batch", "text"),
    "attention_mask": ("batch", "text"),
}
_NUMBERED = re.compile(r"(input_ids|attention_mask)_(\d)")  # of the second text encoder and on
VIDEO_LATENTS = ("batch", "channels", "frames", "height", "width")


@dataclass(frozen=True, slots=True)
class Bucket:
    """One size that an engine is built for.

    Args:
        height, width, frames: of the latents.   text: tokens that each text encoder reads.
        embeds: rows of the prompt's embeddings; needed where a graph leaves their number open.
    """

    height: int
    width: int
    text: tuple[int, ...] = ()
    embeds: int | None = None
    frames: int = 1


def make_profile(
    inputs: Mapping[str, Sequence[int | None]], bucket: Bucket, max_batch: int
) -> dict[str, Profile]:
    """Return smallest, usual and largest shape of every input: batches from 1 to `max_batch`, all else as the bucket.

    Args:
        inputs: shape of each input of the graph, None where an axis is dynamic.
    Raises:
        ValueError: an input or a dynamic axis that we do not know.
    """
    usual = max(1, max_batch // 2)
    return {
        name: Profile(
            smallest=_shape(name, shape, bucket, 1),
            usual=_shape(name, shape, bucket, usual),
            largest=_shape(name, shape, bucket, max_batch),
        )
        for name, shape in inputs.items()
    }


def _shape(name: str, shape: Sequence[int | None], bucket: Bucket, batch: int) -> tuple[int, ...]:
    numbered = _NUMBERED.fullmatch(name)
    kind, encoder = (name, 1) if numbered is None else (numbered[1], int(numbered[2]))
    axes = VIDEO_LATENTS if kind == "latents" and len(shape) == len(VIDEO_LATENTS) else AXES.get(kind)
    if axes is None or len(axes) != len(shape):
        raise ValueError(f"{name} {list(shape)}: expected an input of {', '.join(AXES)}, got another")
    sizes = {
        "batch": batch,
        "height": bucket.height,
        "width": bucket.width,
        "text": bucket.text[encoder - 1] if encoder <= len(bucket.text) else None,
        "embeddings": bucket.embeds,
        "frames": bucket.frames,
    }
    result = []
    for axis, fixed in zip(axes, shape, strict=True):
        size = sizes.get(axis) if fixed is None else fixed
        if size is None:
            raise ValueError(
                f"{name}: expected the axis '{axis}' to be fixed in the graph, got a dynamic one"
            )
        result.append(size)
    return tuple(result)
