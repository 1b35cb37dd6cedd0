"""Which files a network's weights are read from: those that from_pretrained loads."""

import pytest
import torch
from safetensors.torch import save_file

from flashbulb_distill.export.external import read_places
from support.tiny_families import make_tiny_family


@pytest.mark.parametrize("part", ["text_encoder_3", "transformer"])
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_a_variant_beside_the_weights_is_not_read(tmp_path, part, shard):
    """model.fp16-00001-of-00002 sorts after model-00001-of-00002: its tensors were taken, and torch's the others."""
    network = make_tiny_family("sd3")[part]
    network.save_pretrained(tmp_path, max_shard_size=shard)
    own = set(tmp_path.glob("*.safetensors"))
    network.half().save_pretrained(tmp_path, max_shard_size=shard, variant="fp16")
    for index in [*tmp_path.glob("*.index.fp16.json")]:  # diffusers once had the variant before
        index.rename(
            index.with_name(index.name.replace(".safetensors.index.fp16", ".fp16.safetensors.index"))
        )
    assert set(tmp_path.glob("*.safetensors")) > own
    assert len(own) == 1 or shard == "20KB"
    places = read_places(tmp_path).values()
    assert {place.file for place in places} == own
    assert {place.dtype for place in places} == {"F32"}


def test_a_whole_file_goes_before_an_older_index_as_in_transformers(tmp_path):
    make_tiny_family("sd3")["text_encoder_3"].save_pretrained(tmp_path, max_shard_size="20KB")
    save_file({"shared.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert [place.shape for place in read_places(tmp_path).values()] == [(2,)]


def test_a_missing_shard_and_a_variant_alone_are_told(tmp_path):
    network = make_tiny_family("sd3")["transformer"]
    network.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    last = max((tmp_path / "sharded").glob("*.safetensors"))
    last.unlink()
    with pytest.raises(
        ValueError, match=rf"index\.json: expected the files that it names, found no {last.name}"
    ):
        read_places(tmp_path / "sharded")
    network.save_pretrained(tmp_path / "fp16", variant="fp16")
    with pytest.raises(ValueError, match=r"found none beside those of variants like fp16"):
        read_places(tmp_path / "fp16")
