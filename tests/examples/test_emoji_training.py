"""The demo's scripts: the hold-out holds, and an interrupted teacher training ends where the unbroken one does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"


@pytest.fixture(scope="module")
def prepare():
    sys.path.insert(0, str(EMOJI))
    try:
        import prepare
    finally:
        sys.path.remove(str(EMOJI))
    return prepare


def test_no_training_prompt_names_a_held_out_pair(prepare):
    concepts = prepare.read_concepts(EMOJI / "concepts.txt")
    prompts = set((EMOJI / "prompts.txt").read_text(encoding="utf-8").splitlines())
    assert prompts == set(prepare.training_prompts(concepts)), "prompts.txt is what prepare.py writes"
    held_out = [(c, s) for i, c in enumerate(concepts) if (s := prepare.held_out_style(i))]
    assert len(held_out) == len(concepts) // 10
    assert {style for _, style in held_out} == set(prepare.STYLES)
    for concept, style in held_out:
        assert not {f"{concept}, {style} style", f"{style} emoji of {concept}"} & prompts
        assert concept in prompts
    table = json.loads((EMOJI / "variants.json").read_text(encoding="utf-8"))
    assert table == prepare.prompt_variants(concepts), "variants.json is what prepare.py writes"
    assert table.keys() <= prompts
    assert {text for texts in table.values() for text in texts} <= prompts


def test_concepts_are_distinct_and_in_the_announced_number(prepare):
    concepts = prepare.read_concepts(EMOJI / "concepts.txt")
    assert len(set(concepts)) == len(concepts)
    assert 150 <= len(concepts) <= 300


def test_variants_are_seeded_and_stay_in_their_bounds(prepare):
    first, again, other = (list(prepare.variants(50, key=key)) for key in ((1, 2), (1, 2), (1, 3)))
    assert first == again != other
    assert all(0.9 <= zoom <= 1 and abs(dx) <= 0.03 and abs(dy) <= 0.03 for zoom, (dx, dy) in first)


def test_art_is_drawn_on_white_and_where_it_was_moved(prepare):
    half = '<rect x="5" width="5" height="10" fill="#f00"/>'
    image = prepare.draw(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">{half}</svg>')
    assert image.shape == (64, 64, 3)
    assert (image[:, :31] == 255).all()
    assert (image[:, 33:] == (255, 0, 0)).all()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_teacher_training_ends_bitwise_where_the_unbroken_one_does(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 64, 64, 3), dtype=np.uint8)
    save_file({"images": images}, data / "train.safetensors")
    styles = ("noto", "twemoji", "fluent")
    labels = [{"concept": "red apple", "style": style, "split": "train"} for style in styles]
    (data / "train.json").write_text(json.dumps(labels))

    def train(run, *options):
        command = [sys.executable, EMOJI / "train_teacher.py", "--run", tmp_path / run, "--data", data]
        command += ["--steps", "2", "--threads", "1", "--export", tmp_path / f"{run}-teacher", *options]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120)
        return load_file(max((tmp_path / run).glob("checkpoint-*.safetensors")))

    whole = train("whole")
    train("parts", "--stop-at", "1")
    parts = train("parts")
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    assert (tmp_path / "whole-teacher" / "transformer" / "config.json").exists()
