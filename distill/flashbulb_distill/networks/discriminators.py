"""The two discriminators: of noised latents, on the frozen teacher; of pixels, on a frozen image classifier."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..teachers.denoiser import Condition, Denoiser
from .heads import Combination, Head, Heads, VectorHead
from .vision import PixelBackbone

INPUT = -1  # the tap that reads the noised latents themselves, before the backbone


class LatentDiscriminator(nn.Module):
    """Judge noised latents at their time: D(xt, t, condition) on features of the frozen teacher.

    Only the heads are trained. Gradients pass through the frozen backbone to its input.

    Args:
        backbone: the teacher's network; kept out of this module's parameters, since it is the teacher's.
        taps: block numbers; -1 is the input itself.
        channels: channels of the latents.
        axes: of the latents: 2 of pictures [b, c, h, w], 3 of videos [b, c, f, h, w].
        combine: see `Heads`.
    Raises:
        ValueError: the backbone has no such block.
    """

    def __init__(
        self,
        backbone: Denoiser,
        taps: Sequence[int],
        *,
        channels: int,
        axes: int = 2,
        combine: Combination = "places",
    ) -> None:
        super().__init__()
        self._backbone = (backbone,)  # a tuple, so that it is no submodule
        self.taps = tuple(taps)
        widths = {INPUT: channels, **dict(enumerate(backbone.widths))}
        if unknown := [tap for tap in taps if tap not in widths]:
            raise ValueError(
                f"taps: expected -1 (the input) to {max(widths)}, the last block, got {', '.join(map(str, unknown))}"
            )
        self.heads = Heads([Head(widths[tap], axes=axes) for tap in taps], combine)

    def forward(self, xt: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return logits [b, places] of latents [b, c, (f,) h, w] at times [b]."""
        blocks = [tap for tap in self.taps if tap != INPUT]
        maps = (
            dict(zip(blocks, self._backbone[0].features(xt, t, cond, blocks), strict=True)) if blocks else {}
        )
        return self.heads([maps.get(tap, xt) for tap in self.taps], t)  # type: ignore[no-any-return]


class VectorDiscriminator(nn.Module):
    """Judge points of the mixture teacher, which has no blocks: a small network of (x, t)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = Heads([VectorHead(channels)])

    def forward(self, xt: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return logits [b, 1]."""
        return self.heads([xt], t)  # type: ignore[no-any-return]


class PixelDiscriminator(nn.Module):
    """Judge pixels [b, 3, h, w] in [-1, 1] on maps of a frozen image network; no noise, no time.

    Args:
        taps: block numbers of the backbone.   size: side the backbone sees, px.   combine: see `Heads`.
    """

    def __init__(
        self, backbone: PixelBackbone, taps: Sequence[int], *, size: int, combine: Combination = "places"
    ) -> None:
        super().__init__()
        self._backbone = (backbone,)
        self.taps, self.size = tuple(taps), size
        self.heads = Heads([Head(backbone.widths[tap]) for tap in taps], combine)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [b, places]."""
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bicubic", align_corners=False)
        maps = self._backbone[0].maps(pixels, self.taps)
        return self.heads(maps, pixels.new_zeros(len(pixels)))  # type: ignore[no-any-return]
