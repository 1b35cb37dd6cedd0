"""Kept embeddings: an ordinary safetensors file, of which a batch at a time is in memory."""

import os
import weakref

import pytest
import torch
from safetensors.torch import load_file

from flashbulb_distill.bundle import Shape
from flashbulb_distill.teachers.denoiser import Condition
from flashbulb_distill.teachers.embeddings import read_embeddings, write_embeddings
from flashbulb_distill.teachers.load import open_source
from flashbulb_distill.teachers.pretrained import PretrainedTeacher
from flashbulb_distill.teachers.prompts import PromptEncoder
from support.tiny_pipelines import make_tiny_pipeline


@pytest.mark.parametrize("width", [4, 0], ids=["pooled", "without pooled, as CogVideoX"])
def test_it_is_the_file_that_safetensors_reads_and_no_two_parts_are_in_memory(width, tmp_path):
    rows = Condition(torch.randn(7, 5, 3), torch.randn(7, width))
    others, alive = [], weakref.WeakSet()

    def parts():
        for start in (0, 3, 6):
            part = Condition(rows.tokens[start : start + 3].clone(), rows.pooled[start : start + 3].clone())
            alive.add(part.tokens)
            yield part
            del part
            others.append(len(alive))

    write_embeddings(tmp_path / "a.safetensors", 7, lambda first: parts())
    assert max(others) <= 1
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == {"tokens", "pooled"}
    assert torch.equal(found["tokens"], rows.tokens)
    assert torch.equal(found["pooled"], rows.pooled)
    assert torch.equal(read_embeddings(tmp_path / "a.safetensors").tokens, rows.tokens)


def test_a_file_with_rows_missing_does_not_appear(tmp_path):
    with pytest.raises(ValueError, match="expected 3 rows, got 2"):
        two = [Condition(torch.ones(2, 1, 1), torch.ones(2, 1))]
        write_embeddings(tmp_path / "a.safetensors", 3, lambda first: two)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [4, 0], ids=["pooled", "without pooled"])
@pytest.mark.parametrize(
    ("torn", "began"),
    [(0, 6), (0.5, 4), (5, 0), (5.5, 0), (None, 0)],
    ids=["between two batches", "in a row", "in the first batch", "in its first row", "in the head"],
)
def test_what_was_broken_off_goes_on_behind_its_last_whole_batch(width, torn, began, tmp_path):
    """Ten thousand prompts through T5-XXL are a day of a CPU, which any interruption cost from the start.

    What was broken off in the first batch became a file without a header, which was kept for good.
    """
    rows, path, seen = Condition(torch.randn(8, 5, 3), torch.randn(8, width)), tmp_path / "a.safetensors", []

    def parts(first, end=8):
        seen.append(first)
        for start in range(first, end, 2):
            yield rows.take(torch.arange(start, start + 2))
        if end < 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(path, 8, lambda first: parts(first, 6), batch_size=2)
    assert not path.exists()
    (unfinished,) = tmp_path.iterdir()
    size = unfinished.stat().st_size
    row_bytes = 4 * (width or 5 * 3)  # of the tensor at the file's end
    os.truncate(unfinished, 100 if torn is None else size - int(torn * row_bytes))
    told = []
    write_embeddings(path, 8, parts, batch_size=2, progress=lambda *at: told.append(at))
    assert seen == [0, began], "a batch is encoded as it would have been"
    assert told == [(done, 8) for done in range(began + 2, 9, 2)]
    found = load_file(path)
    assert torch.equal(found["tokens"], rows.tokens)
    assert torch.equal(found["pooled"], rows.pooled)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_kept_is_what_the_encoders_say_and_they_are_asked_once(tmp_path, monkeypatch):
    source = open_source(make_tiny_pipeline(tmp_path / "teacher", "sdxl"))
    prompts = ["red", "a dog", ""] * 15  # more than a batch
    wanted, empty = source.prompts().encode(prompts), source.prompts().encode_uncond()
    shape = Shape(width=64, height=64)
    teacher = PretrainedTeacher(source, shape, torch.device("cpu"), tmp_path / "kept")
    for _ in range(2):
        assert torch.equal(teacher.encode(prompts).tokens, wanted.tokens)
        assert torch.equal(teacher.encode_uncond().pooled, empty.pooled)
        monkeypatch.setattr(PromptEncoder, "forward", None)  # from now on nothing is encoded
        monkeypatch.setattr("flashbulb_distill.teachers.load._PROMPTS", {})
