"""Clips are judged by motion and subject: real ones pass, a wrong subject or motion is seen, and nothing else."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashbulb_distill.evaluate.clip_table import clip_shares, clip_table, save_clip_sheet
from flashbulb_distill.evaluate.clips import evaluate_clips, load_clip_reference
from flashbulb_distill.evaluate.errors import EvaluationError, ReferenceDataError

SIDE, FRAMES = 32, 16
U = np.linspace(0, 1, FRAMES)
COLOURS = {"plum": (120, 30, 140), "lime": (60, 200, 40), "sky": (40, 120, 230)}
MOVES = {
    "flying up": lambda u: (0.5 + 0 * u, 0.75 - 0.5 * u),
    "sliding left": lambda u: (0.75 - 0.5 * u, 0.5 + 0 * u),
}


def draw(subject, motion, shift):
    ys, xs = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    cx, cy = (part[:, None, None] + shift for part in MOVES[motion](U))
    cover = np.clip((0.15 - np.hypot(xs - cx, ys - cy)) * SIDE + 0.5, 0, 1)[..., None]
    return np.rint(255 * (1 - cover) + cover * np.array(COLOURS[subject])).astype(np.uint8)


def few_features(images):
    """Colour and place in nine fields: enough to tell these clips apart, in no time."""
    fields = images.reshape(len(images), 4, 8, 4, 8, 3).mean((2, 4))
    return (255 - fields).reshape(len(images), -1).astype(np.float32)


@pytest.fixture
def reference(tmp_path):
    pairs = [(s, m) for s in COLOURS for m in MOVES]
    for split, some in (("train", pairs[:5]), ("held-out", pairs[5:])):
        clips = [[draw(s, m, shift) for shift in (-0.02, 0.0, 0.01, 0.02)] for s, m in some]
        save_file({"clips": np.array(clips)}, tmp_path / f"{split}.safetensors")
        (tmp_path / f"{split}.json").write_text(json.dumps([{"subject": s, "motion": m} for s, m in some]))
    return load_clip_reference(tmp_path)


def measure(reference, change=lambda subject, motion: (subject, motion)):
    def generate(prompts, seeds):
        words = [prompt.split(" ", 1) for prompt in prompts]
        return np.array(
            [draw(*change(s, m), 0.004 * seed) for (s, m), seed in zip(words, seeds, strict=True)]
        )

    options = {"trained_stride": 1, "num_components": 4, "embed": few_features}
    return evaluate_clips(generate, reference, range(3), **options)


def test_what_was_asked_for_passes_and_each_fault_lowers_its_own_figure(reference):
    good = measure(reference)
    for figures in (good.trained, good.held_out, good.real):
        assert (figures.motion_correct.value, figures.subject_correct.value, figures.still) == (1, 1, 0)
        assert figures.amplitude == pytest.approx(1, abs=0.1)
    other_subject = measure(reference, lambda s, m: ("lime", m))
    assert other_subject.trained.motion_correct.value == 1
    assert other_subject.trained.subject_correct.value == pytest.approx(2 / 5)
    assert other_subject.trained.frechet > 10 * good.trained.frechet
    other_motion = measure(reference, lambda s, m: (s, "flying up"))
    assert other_motion.trained.motion_correct.value == pytest.approx(3 / 5)
    assert (
        clip_shares(other_subject, good)["subject_correct"] < clip_shares(good, good)["subject_correct"] == 1
    )
    assert "Motion as asked | 1.000" in clip_table({"student": good})


def test_seeds_that_draw_one_clip_have_no_diversity(reference):
    def generate(prompts, seeds):
        return np.array([draw(*prompt.split(" ", 1), 0.0) for prompt in prompts])

    same = evaluate_clips(
        generate, reference, range(2), trained_stride=1, num_components=4, embed=few_features
    )
    assert same.trained.diversity == pytest.approx(0, abs=1e-9)
    assert measure(reference).trained.diversity > 1e-4


def test_wrong_input_is_refused(reference, tmp_path):
    with pytest.raises(EvaluationError, match="two or more distinct seeds"):
        evaluate_clips(lambda prompts, seeds: None, reference, [1], embed=few_features)
    with pytest.raises(EvaluationError, match=r"clips uint8 \[n, frames, h, w, 3\]"):
        evaluate_clips(lambda prompts, seeds: np.zeros((1, 2)), reference, [1, 2], embed=few_features)
    with pytest.raises(ReferenceDataError, match=r"prepare\.py"):
        load_clip_reference(tmp_path / "none")


def test_a_sheet_has_a_line_a_prompt(reference, tmp_path):
    clips = np.array([draw("plum", "flying up", 0.0), draw("sky", "sliding left", 0.0)])
    save_clip_sheet(tmp_path / "sheet.png", [("a", clips), ("b", clips)], ["one", "two"])
    from PIL import Image

    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == 24 + 2 * (2 * SIDE + 2)
        assert sheet.width == 190 + 2 * (8 * 2 * SIDE + 10)
