"""The codec of clips against principal components computed another way."""

import numpy as np
import torch

from flashbulb_distill.teachers.clip_codec import ClipCodec, clips_to_pixels, fit_clip_codec


def low_rank_clips(count: int, rank: int) -> torch.Tensor:
    """Clips whose 4 x 8 x 8 patches lie in a space of few dimensions, around a colour."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((rank, 3, 4, 8, 8))
    basis -= basis.mean((2, 3, 4), keepdims=True)  # a colour's mean is the codec's own constant
    amounts = rng.standard_normal((count, 2, 2, 3, rank)) * 0.1
    patches = np.einsum("nfhwr,rcabd->ncfahbwd", amounts, basis).reshape(count, 3, 8, 16, 24)
    return torch.from_numpy(patches).float() + torch.tensor([0.1, -0.2, 0.3])[:, None, None, None]


def test_clips_of_as_few_components_as_there_are_channels_come_back_exactly():
    clips = low_rank_clips(20, 5)
    codec = ClipCodec(channels=6).requires_grad_(False)
    fit_clip_codec(codec, clips)
    latents = codec.encode(clips)
    assert latents.shape == (20, 6, 2, 2, 3)
    torch.testing.assert_close(codec.decode(latents), clips, atol=1e-4, rtol=0)


def test_the_error_is_what_the_left_out_components_hold_and_latents_have_unit_deviation():
    clips = torch.from_numpy(np.random.default_rng(1).standard_normal((40, 3, 8, 16, 16))).float()
    codec = ClipCodec(channels=32).requires_grad_(False)
    fit_clip_codec(codec, clips)
    patches = clips.unfold(2, 4, 4).unfold(3, 8, 8).unfold(4, 8, 8)  # [n, 3, 2, 2, 2, 4, 8, 8]
    rows = patches.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, 768).double()
    rows = rows - rows.mean(0)
    left_out = torch.linalg.svdvals(rows)[32:].square().sum() / rows.numel()
    error = (codec(clips) - clips).square().mean()
    torch.testing.assert_close(error.double(), left_out, rtol=0.02, atol=0)
    torch.testing.assert_close(codec.encode(clips).std(), torch.tensor(1.0), rtol=0.02, atol=0)


def test_clips_become_pixels_with_colours_first():
    clip = torch.zeros(1, 2, 3, 4, 3, dtype=torch.uint8)
    clip[0, 1, 2, 3] = torch.tensor([255, 0, 51])
    pixels = clips_to_pixels(clip)
    assert pixels.shape == (1, 3, 2, 3, 4)
    torch.testing.assert_close(pixels[0, :, 1, 2, 3], torch.tensor([1.0, -1.0, -0.6]))
