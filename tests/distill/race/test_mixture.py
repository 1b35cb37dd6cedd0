"""The race on the mixture: figures that cannot lie, equal terms for all, and results that can be made again."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flashbulb_distill.cli import app
from flashbulb_distill.race import mixture
from flashbulb_distill.race.course import Course, judge_points
from flashbulb_distill.race.entries import ENTRIES, find_entries
from flashbulb_distill.race.mixture import MixtureRace
from flashbulb_distill.race.picture import draw_points
from flashbulb_distill.race.points import build_for_points
from flashbulb_distill.race.result import RaceResult, RunResult, interval, race_table
from flashbulb_distill.teachers.mixture import ring

SMALL = Course(moves=6, warmup=2, num_pairs=64, start_steps=20, num_samples=200, batch_size=16, width=16)


def exact(course, seed, modes=None):
    """Draw points of the teacher, from some of its modes only if asked to."""
    rng = np.random.default_rng(seed)
    picks = rng.choice(modes if modes is not None else course.num_modes, size=4000)
    return ring(course.num_modes).double().numpy()[picks] + course.std * rng.standard_normal((4000, 2))


def test_exact_samples_of_the_teacher_lose_nothing():
    course = Course()
    figures = judge_points(exact(course, 1), exact(course, 2), course)
    assert figures.modes == 8
    assert figures.off == pytest.approx(0.0111, abs=0.006), "the share of a plane's Gaussian beyond 3 std"
    assert figures.misplaced < 0.04
    assert figures.frechet < 0.01
    assert figures.precision > 0.9
    assert figures.recall > 0.9


def test_lost_modes_and_points_between_modes_are_told_apart():
    course = Course()
    real = exact(course, 2)
    few = judge_points(exact(course, 1, modes=[0, 1, 2, 3, 4]), real, course)
    assert few.modes == 5
    assert few.misplaced == pytest.approx(3 / 8, abs=0.03)
    assert few.precision > 0.9
    assert few.recall < 0.75
    between = judge_points(np.random.default_rng(0).standard_normal((4000, 2)) * 0.3, real, course)
    assert between.modes == 0
    assert between.off > 0.99
    assert between.misplaced > 0.99


def test_a_mode_with_less_than_a_quarter_of_its_share_counts_as_lost():
    course = Course()
    points = exact(course, 1, modes=[0] * 10 + [1] * 10 + [2] * 1 + [3] * 10)
    assert judge_points(points, exact(course, 2), course).modes == 4
    rare = exact(course, 1, modes=[0] * 50 + [1] * 50 + [2] * 1)
    assert judge_points(rare, exact(course, 2), course).modes == 2


@pytest.fixture(scope="module")
def race():
    torch.manual_seed(0)
    return MixtureRace(SMALL, 3)


def test_all_entries_start_from_one_network_and_the_pairs_end_near_modes(race):
    for stage in {stage for entry in ENTRIES for stage in entry.stages}:
        method, warmup = build_for_points(stage, SMALL, 3, race.pairs, race.start, race.start)
        own = dict(method.modules["student"].named_parameters())
        assert all(torch.equal(own[name], race.start[name]) for name in own), stage
        assert warmup == (0 if stage in ("regression", "lcm") else SMALL.warmup)
    figures = judge_points(race.pairs.x_0.flatten(1).double().numpy(), exact(SMALL, 0), SMALL)
    assert figures.modes == 8
    assert figures.off < 0.06


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_runs_and_moves_the_student(race, entry):
    steps = []
    points, seconds = race.run(entry, lambda name, step, total: steps.append((name, step, total)))
    assert points.shape == (SMALL.num_samples, 2)
    assert torch.isfinite(points).all()
    assert not torch.equal(points, race.sample(race.start))
    assert seconds > 0
    moved = sum(
        total - (0 if name.split()[-1] in ("regression", "lcm") else SMALL.warmup)
        for name, step, total in steps
        if step == total
    )
    assert moved == SMALL.moves, "the student's updates are the same for all"


def test_the_command_writes_a_table_figures_and_a_picture_that_repeat_to_the_digit(tmp_path, monkeypatch):
    """The whole command, at a size that takes seconds."""
    monkeypatch.setattr(
        "flashbulb_distill.race.course.Course.__init__.__defaults__",
        tuple(getattr(SMALL, name) for name in Course.__dataclass_fields__),
    )
    outputs = []
    for name in ("a", "b"):
        options = [
            "compare",
            "--methods",
            "B2,a1",
            "--seeds",
            "2",
            "--moves",
            "4",
            "--out",
            str(tmp_path / name),
        ]
        done = CliRunner().invoke(app, options)
        assert done.exit_code == 0, done.output
        outputs.append(json.loads((tmp_path / name / "race.json").read_text()))
        assert (tmp_path / name / "points.png").stat().st_size > 500
    assert outputs[0]["course"] == outputs[1]["course"]
    figures = [[(run["entry"], run["seed"], run["figures"]) for run in output["runs"]] for output in outputs]
    assert figures[0] == figures[1]
    assert [entry for entry, seed, _ in figures[0] if seed == 0] == ["B2", "A1", "start", "teacher"]
    table = (tmp_path / "a" / "table.md").read_text()
    assert "| B2 | DMD without ADP |" in table
    assert table.count("±") == 4 * 6


def test_intervals_are_students_t_over_seeds():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 * 1.0 / 3**0.5, rel=1e-5)
    assert interval([5.0]) == (5.0, None)


def test_the_table_leaves_out_what_was_not_measured_and_averages_over_seeds():
    runs = [
        RunResult(entry="A1", title="x", seed=s, cpu_seconds=4.0, figures={"modes": m})
        for s, m in ((0, 6.0), (1, 8.0))
    ]
    result = RaceResult(on="mixture", course={}, seeds=(0, 1), runs=tuple(runs), provenance={})
    line = race_table(result, {"modes": "modes", "recall": "recall"}).splitlines()[-1]
    assert line == "| A1 | x | 7.000 ± 12.706 | – | 4 |"


def test_an_unknown_method_is_refused_in_one_line():
    assert [entry.name for entry in find_entries("b4, DMD2,b4")] == ["B4", "DMD2"]
    with pytest.raises(
        ValueError, match="expected some of A1, A5, B1, B2, B3, B4, B4h, DMD2, LADD, LCM, got 'A9'"
    ):
        find_entries("A9")


def test_a_picture_of_points_has_them_where_they_are_and_y_upwards():
    image = draw_points(np.array([[2.9, 2.9]] * 50), 3.0, side=30)
    dark = np.argwhere(image[..., 0] < 128)
    assert dark.tolist() == [[0, 29]]


def test_an_entry_that_carries_heads_over_hands_adps_to_adm(race, monkeypatch):
    """Both entries are one but for the heads at the start of ADM."""

    def train(method, folder, **options):
        if folder.name == "adm":
            seen.append(torch.cat([p.detach().flatten() for p in method.modules["latent"].parameters()]))
        averages = plain(method, folder, **options)
        if folder.name == "adp":
            ends.append(torch.cat([p.detach().flatten() for p in method.modules["latent"].parameters()]))
        return averages

    plain, seen, ends = mixture.train, [], []
    monkeypatch.setattr(mixture, "train", train)
    for name in ("B4", "B4h"):
        race.run(*find_entries(name), lambda *_: None)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(seen[1], ends[1])
    assert not torch.equal(seen[0], ends[0])
