"""SAM's and DINOv2's encoders as backbones: the maps are transformers' own hidden states."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, SamConfig, SamModel, SamVisionConfig

from flashbulb_distill.errors import MissingFileError
from flashbulb_distill.networks.discriminators import PixelDiscriminator
from flashbulb_distill.networks.lite0 import BLOCK_CHANNELS
from flashbulb_distill.networks.vision import MEAN, STD, load_pixel_backbone

SIZE = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Save tiny random models as their publishers do: SAM whole, with its mask decoder."""
    torch.manual_seed(0)
    vision = SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=64,
        num_pos_feats=8,
    )
    dino = Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE, patch_size=8
    )
    models = {"sam": SamModel(SamConfig(vision_config=vision.to_dict())), "dinov2": Dinov2Model(dino)}
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.eval().save_pretrained(folders[name])
    return models, folders


def hidden_states(models, name, pixels):
    """Return the layers' outputs as maps, from the whole model on its own normalised pixels."""
    scaled = (pixels / 2 + 0.5 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    model = models["sam"].vision_encoder if name == "sam" else models[name]
    states = model(scaled, output_hidden_states=True).hidden_states[1:]
    if name == "sam":
        return [state.permute(0, 3, 1, 2) for state in states]
    side = SIZE // 8
    return [state[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2) for state in states]


@pytest.mark.parametrize("name", ["sam", "dinov2"])
def test_maps_are_the_hidden_states_of_the_whole_model(models, name):
    backbone = load_pixel_backbone(name, models[1][name], size=SIZE, taps=(0, 1))
    pixels = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        expected = hidden_states(models[0], name, pixels)
    maps = backbone.maps(pixels, (0, 1))
    assert len(backbone.widths) == 2, "the layers after the last tap are dropped"
    for got, state, width in zip(maps, expected, backbone.widths, strict=False):
        assert got.shape[1] == width
        torch.testing.assert_close(got, state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sam", "dinov2"])
def test_the_discriminator_reads_it_trains_heads_alone_and_hands_a_gradient_to_the_pixels(models, name):
    backbone = load_pixel_backbone(name, models[1][name], size=SIZE, taps=(0, 2))
    discriminator = PixelDiscriminator(backbone, (0, 2), size=SIZE)
    pixels = torch.rand(2, 3, 16, SIZE).requires_grad_()  # resized to what the backbone sees
    discriminator.train()
    assert not backbone.training
    discriminator(pixels).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_lite0_says_its_widths():
    assert load_pixel_backbone("lite0", None, size=64, taps=(2,)).widths == BLOCK_CHANNELS


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sam", {"size": 64}, "pixel_size: expected 32, the only size this SAM sees, got 64"),
        ("dinov2", {"size": 36}, "pixel_size: expected a multiple of 8, got 36"),
        ("dinov2", {"taps": (3,)}, "pixel_taps: expected numbers from 0 to 2, got 3"),
    ],
)
def test_what_a_backbone_cannot_do_is_said_in_one_line(models, name, options, message):
    with pytest.raises(ValueError, match=message):
        load_pixel_backbone(name, models[1][name], **{"size": SIZE, "taps": (0,)} | options)


def test_a_missing_source_and_one_of_another_kind_are_refused(models, tmp_path):
    with pytest.raises(ValueError, match="folder or hub id for sam, like facebook/sam-vit-base"):
        load_pixel_backbone("sam", None, size=SIZE, taps=(0,))
    with pytest.raises(MissingFileError, match="expected a dinov2 model"):
        load_pixel_backbone("dinov2", tmp_path, size=SIZE, taps=(0,))
