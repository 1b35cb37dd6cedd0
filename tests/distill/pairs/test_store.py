"""The pair store: resumable, and damage is seen."""

import pytest
import torch

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.pairs.generate import generate_pairs, sample_teacher
from flashbulb_distill.pairs.store import read_pairs
from flashbulb_distill.ranks import ALONE, Ranks
from flashbulb_distill.teachers.denoiser import Condition
from flashbulb_distill.teachers.mixture import MixtureDenoiser, ring

PROMPTS = ("a", "b")
COND = Condition(torch.zeros(2, 1, 1), torch.zeros(2, 1))
UNCOND = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))


def generate(folder, count, **options):
    settings = {
        "latent_shape": (2, 1, 1),
        "num_steps": 20,
        "guidance": 1.0,
        "draws": Draws(0),
        "batch_size": 5,
    }
    denoiser = MixtureDenoiser(ring(4), 0.05)
    generate_pairs(folder, denoiser, PROMPTS, COND, UNCOND, count=count, **(settings | options))


def test_an_interrupted_store_goes_on_as_if_it_had_not_been(tmp_path):
    generate(tmp_path / "whole", 12)
    generate(tmp_path / "parts", 5)
    (tmp_path / "parts" / ".shard-00001.safetensors.tmp").write_bytes(b"half a shard")
    generate(tmp_path / "parts", 12)
    whole, parts = read_pairs(tmp_path / "whole"), read_pairs(tmp_path / "parts")
    assert torch.equal(whole.x_T, parts.x_T)
    assert torch.equal(whole.x_0, parts.x_0)
    assert torch.equal(whole.prompt, parts.prompt)
    assert len(whole) == 12


def test_all_ranks_call_the_network_alike_where_they_share_it(tmp_path):
    """In the last round there may be no batch left for some: without them the others would wait for ever."""

    class Counted(MixtureDenoiser):
        calls = 0

        def forward(self, *inputs):
            self.calls += 1
            return super().forward(*inputs)

    class Second(Ranks):
        def first(self, work):
            return 0, 0

        def gather(self, value):
            assert value is None, "the batch is the first one's"
            return [{"count": 5}, value]

    called = []
    for number, ranks in enumerate((ALONE, Second(1, 2))):
        network = Counted(ring(4), 0.05)
        generate_pairs(
            tmp_path / str(number), network, PROMPTS, COND, UNCOND, latent_shape=(2, 1, 1), count=5,
            num_steps=3, guidance=1.0, draws=Draws(0), batch_size=5, ranks=ranks,
        )  # fmt: skip
        called.append(network.calls)
    assert called[0] == called[1] > 0


def test_a_torn_last_line_of_the_index_is_made_anew(tmp_path):
    """An interruption within the write of the line stopped every resume with an error of the JSON reader."""
    generate(tmp_path / "whole", 10)
    generate(tmp_path / "torn", 10)
    index = tmp_path / "torn" / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    assert len(read_pairs(tmp_path / "torn")) == 5
    generate(tmp_path / "torn", 10)
    whole, torn = read_pairs(tmp_path / "whole"), read_pairs(tmp_path / "torn")
    assert torch.equal(whole.x_0, torn.x_0)
    assert index.read_bytes() == (tmp_path / "whole" / "index.jsonl").read_bytes()


def test_every_pair_ends_near_a_mode_and_all_modes_are_reached(tmp_path):
    generate(tmp_path, 60)
    x_0 = read_pairs(tmp_path).x_0.flatten(1)
    distances = torch.cdist(x_0, ring(4))
    assert distances.min(1).values.max() < 0.4
    assert set(distances.argmin(1).tolist()) == {0, 1, 2, 3}


def test_a_flipped_byte_and_other_prompts_are_refused(tmp_path):
    generate(tmp_path, 5)
    shard = tmp_path / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="expected sha256"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match="other prompts"):
        generate_pairs(
            tmp_path, MixtureDenoiser(ring(4), 0.05), ("c",), COND, UNCOND,
            latent_shape=(2, 1, 1), count=9, num_steps=2, guidance=1.0, draws=Draws(0),
        )  # fmt: skip


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected ODE pairs"):
        read_pairs(tmp_path)


def test_teacher_sampling_of_one_gaussian_is_its_exact_flow():
    denoiser = MixtureDenoiser(torch.tensor([[1.0, -2.0]]), 0.5)
    noise = torch.randn(50, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    arrived = sample_teacher(
        denoiser, noise, COND.take(torch.zeros(50, dtype=torch.int64)), UNCOND, num_steps=300, guidance=1.0
    )
    expected = torch.tensor([1.0, -2.0])[:, None, None] + 0.5 * noise
    torch.testing.assert_close(arrived, expected, atol=0.02, rtol=0)
