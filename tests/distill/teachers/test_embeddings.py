"""Kept embeddings: an ordinary safetensors file, of which a batch at a time is in memory."""

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

    write_embeddings(tmp_path / "a.safetensors", 7, parts())
    assert max(others) <= 1
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == {"tokens", "pooled"}
    assert torch.equal(found["tokens"], rows.tokens)
    assert torch.equal(found["pooled"], rows.pooled)
    assert torch.equal(read_embeddings(tmp_path / "a.safetensors").tokens, rows.tokens)


def test_a_file_with_rows_missing_does_not_appear(tmp_path):
    with pytest.raises(ValueError, match="expected 3 rows, got 2"):
        write_embeddings(tmp_path / "a.safetensors", 3, [Condition(torch.ones(2, 1, 1), torch.ones(2, 1))])
    assert list(tmp_path.iterdir()) == []


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
