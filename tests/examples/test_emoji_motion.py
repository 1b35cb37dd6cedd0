"""The video demo's scripts: pairs are held out evenly, clips move as their captions say, training can be resumed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from flashbulb_distill.teachers.emoji_motion import load_motion_teacher

FOLDER = Path(__file__).parents[2] / "examples" / "emoji_motion"


@pytest.fixture(scope="module")
def prepare():
    before = set(sys.modules)
    kept = sys.modules.pop("prepare", None)  # the image demo's script has the same name
    sys.path.insert(0, str(FOLDER))
    try:
        import prepare
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("prepare", *(set(sys.modules) - before)):
            if name in ("prepare", "motions", "art"):
                sys.modules.pop(name, None)
        if kept is not None:
            sys.modules["prepare"] = kept
    return prepare


@pytest.fixture(scope="module")
def sprite():
    """A black square that fills its sprite."""
    return Image.fromarray(np.full((64, 64, 4), (0, 0, 0, 255), np.uint8), "RGBA")


def ink(clip):
    """Return each frame's darkness as weights [frames, h, w] in [0, 1]."""
    return 1 - clip.mean(-1) / 255


def centres(clip):
    weights = ink(clip)
    mass = weights.sum((1, 2))
    ys, xs = np.mgrid[: clip.shape[1], : clip.shape[2]]
    return (weights * xs).sum((1, 2)) / mass, (weights * ys).sum((1, 2)) / mass, mass


def clip_of(prepare, sprite, motion, seed=0):
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)))
    return prepare.draw_clip(sprite, motion, rng)


@pytest.mark.parametrize(
    ("motion", "dx", "dy", "growth"),
    [
        ("flying up", 0, -1, 1),
        ("sliding left", -1, 0, 1),
        ("sliding right", 1, 0, 1),
        ("growing", 0, 0, 3),
        ("shrinking", 0, 0, 1 / 3),
    ],
)
def test_a_subject_moves_as_its_caption_says_and_in_no_other_way(prepare, sprite, motion, dx, dy, growth):
    for seed in range(5):
        xs, ys, mass = centres(clip_of(prepare, sprite, motion, seed))
        across, down = (xs[-1] - xs[0]) / 32, (ys[-1] - ys[0]) / 32
        assert 0.4 < across * dx < 0.6 if dx else abs(across) < 0.02
        assert 0.4 < down * dy < 0.6 if dy else abs(down) < 0.02
        ratio = np.sqrt(mass[-1] / mass[0])
        assert ratio > 2 if growth > 1 else ratio < 0.5 if growth < 1 else 0.9 < ratio < 1.1


def test_a_bouncing_subject_goes_up_and_comes_down_again(prepare, sprite):
    for seed in range(5):
        xs, ys, mass = centres(clip_of(prepare, sprite, "bouncing", seed))
        assert np.ptp(ys) > 0.3 * 32
        assert np.ptp(xs) < 0.02 * 32
        assert np.ptp(mass) < 0.1 * mass.mean()
        turns = np.diff(np.sign(np.diff(ys)[np.abs(np.diff(ys)) > 0.2]))
        assert 1 <= np.count_nonzero(turns) <= 3


def test_clips_are_seeded_anti_aliased_and_white_around_the_subject(prepare, sprite):
    first, again, other = (clip_of(prepare, sprite, "growing", seed) for seed in (3, 3, 4))
    assert first.shape == (16, 32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (first[:, 0, 0] == 255).all()
    assert ((first > 20) & (first < 235)).any(), "an edge between two pixels is neither black nor white"


def test_every_motion_is_held_out_equally_often_and_no_training_prompt_names_such_a_pair(prepare):
    subjects = prepare.read_concepts(FOLDER / "subjects.txt")
    motions = list(prepare.MOTIONS)
    held_out = [
        (s, m) for i, s in enumerate(subjects) for j, m in enumerate(motions) if prepare.is_held_out(i, j)
    ]
    assert len(subjects) == len(set(subjects)) == len(held_out) == 24
    assert {m: sum(m == other for _, other in held_out) for m in motions} == dict.fromkeys(motions, 4)
    prompts = set((FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines())
    every = {f"{article}{s} {m}" for s in subjects for m in motions for article in ("", "a ")}
    assert prompts == every - {f"{article}{s} {m}" for s, m in held_out for article in ("", "a ")}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_training_ends_bitwise_where_the_unbroken_one_does_and_is_a_teacher(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    labels = [{"subject": name, "motion": "growing"} for name in ("star", "sun")]
    save_file(
        {"clips": rng.integers(0, 256, (2, 4, 16, 32, 32, 3)).astype(np.uint8)}, data / "train.safetensors"
    )
    for split in ("train", "held-out"):
        (data / f"{split}.json").write_text(json.dumps(labels))

    def run(name, *extra):
        command = [sys.executable, "-W", "ignore", FOLDER / "train_teacher.py", "--run", tmp_path / name]
        subprocess.run([*command, "--data", data, "--steps", "4", *extra], check=True, capture_output=True)

    run("codec", "--stop-at", "1")  # fitted once: its bytes may differ from one process to the next
    for name in ("whole", "broken"):
        shutil.copytree(tmp_path / "codec" / "codec", tmp_path / name / "codec")
    run("whole")
    run("broken", "--stop-at", "2")
    run("broken", "--export", tmp_path / "teacher")
    whole, broken = (
        load_file(max((tmp_path / name).glob("checkpoint-*.safetensors"))) for name in ("whole", "broken")
    )
    assert whole.keys() == broken.keys()
    assert all(np.array_equal(whole[name], broken[name]) for name in whole)

    teacher = load_motion_teacher(tmp_path / "teacher")
    assert teacher.latent_shape == (128, 4, 4, 4)
    assert str(tmp_path) not in (tmp_path / "teacher" / "codec" / "config.json").read_text()
