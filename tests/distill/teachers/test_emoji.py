"""The demo family: its wrapper against diffusers' own output, its codec, its text encoder."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from flashbulb_distill.teachers.emoji import load_emoji_teacher
from flashbulb_distill.teachers.patch_codec import PatchCodec, fit_linear, to_pixels
from support.tiny_teacher import make_tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_emoji_teacher(make_tiny_teacher(tmp_path_factory.mktemp("teacher")))


def test_wrapper_is_diffusers_own_output_bitwise(teacher):
    xt, t, cond = torch.randn(2, 64, 8, 8), torch.tensor([0.3, 1.0]), teacher.encode(["red apple", ""])
    plain = SD3Transformer2DModel.from_pretrained(teacher.folder / "transformer")
    with torch.no_grad():
        expected = plain(xt, cond.tokens, cond.pooled, t * 1000).sample
        assert torch.equal(teacher.denoiser(xt, t, cond), expected)


def test_features_are_the_blocks_image_tokens_in_their_places(teacher):
    """The last block's features, normalised and projected by hand, are the network's output."""
    xt, t, cond = torch.randn(2, 64, 8, 8), torch.tensor([0.3, 1.0]), teacher.encode(["red apple", ""])
    network = teacher.denoiser.transformer
    with torch.no_grad():
        (last,) = teacher.denoiser.features(xt, t, cond, [1])
        emb = network.time_text_embed(t * 1000, cond.pooled)
        tokens = network.proj_out(network.norm_out(last.flatten(2).transpose(1, 2), emb))
        expected = tokens.transpose(1, 2).reshape(2, 64, 8, 8)
        torch.testing.assert_close(teacher.denoiser(xt, t, cond), expected)


def test_bfloat16_is_close_to_float32_and_not_the_same(teacher):
    xt, t, cond = torch.randn(2, 64, 8, 8), torch.tensor([0.3, 1.0]), teacher.encode(["red apple", ""])
    rough = load_emoji_teacher(teacher.folder, bf16=True)
    with torch.no_grad():
        exact, arrived = teacher.denoiser(xt, t, cond), rough.denoiser(xt, t, cond)
    assert arrived.dtype == torch.float32
    assert not torch.equal(exact, arrived)
    assert (exact - arrived).abs().max() < 0.05 * exact.abs().max()


def test_a_prompts_embedding_does_not_depend_on_its_neighbours(teacher):
    alone, together = teacher.encode(["a rocket"]), teacher.encode(["dog", "a rocket", "x y z"])
    torch.testing.assert_close(together.tokens[1], alone.tokens[0], atol=1e-5, rtol=1e-5)
    assert (alone.tokens[0, 5:] == 0).all(), "padding must be zero"


def test_codec_is_exact_on_what_its_components_and_each_channels_level_span():
    torch.manual_seed(0)
    basis = torch.randn(5, 3, 64)
    basis = (basis - basis.mean(-1, keepdim=True)).flatten(
        1
    )  # a channel's level is the bias's, not a component's
    patches = torch.randn(4, 64, 5) @ basis + 0.3
    pixels = torch.nn.functional.pixel_shuffle(patches.transpose(1, 2).reshape(4, 192, 8, 8), 8)
    codec = PatchCodec(channels=16)
    fit_linear(codec, pixels)
    with torch.no_grad():
        latents = codec.encode(pixels)
        torch.testing.assert_close(codec(pixels), pixels, atol=1e-3, rtol=1e-3)
    assert abs(latents.std().item() - 1) < 0.2


def test_pixels_span_minus_one_to_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 2, 1).expand(1, 1, 2, 3)
    assert to_pixels(images)[0, 0].tolist() == [[-1.0, 1.0]]


def test_a_folder_that_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an emoji teacher"):
        load_emoji_teacher(tmp_path)
