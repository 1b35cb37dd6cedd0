"""The race on a recipe's teacher: equal terms, nothing done twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from flashbulb_distill.race.entries import ENTRIES, find_entries
from flashbulb_distill.race.pictures import PictureRace, section_of
from flashbulb_distill.run import start_run
from flashbulb_distill.train.dmd import Dmd
from flashbulb_distill.train.recipe import RecipeError, load_recipe
from support.tiny_teacher import make_tiny_teacher

RECIPE = Path(__file__).parents[3] / "distill" / "recipes" / "emoji.yaml"
CONCEPTS = ("red apple", "rocket", "dog face")
DMD = "dmd={steps: 9, batch_size: 4, rates: {student: 1e-5, heads: 1e-4}, guidance: 3.0, gan_weight: 0.5, taps: [1]}"


def recipe_of(folder, *overrides):
    rng = np.random.default_rng(0)
    labels = [{"concept": c, "style": s, "split": "train"} for c in CONCEPTS for s in ("noto", "twemoji")]
    images = rng.integers(0, 256, (len(labels), 64, 64, 3), dtype=np.uint8)
    save_file({"images": images}, folder / "reference.safetensors")
    (folder / "reference.json").write_text(json.dumps(labels))
    (folder / "prompts.txt").write_text("\n".join(CONCEPTS) + "\n")
    small = [
        f"teacher={make_tiny_teacher(folder / 'teacher')}", f"prompts={folder / 'prompts.txt'}",
        f"evaluate.reference={folder}", "precision=float32", "pairs.count=8", "pairs.num_steps=2",
        "regression.steps=2", "regression.batch_size=4",
        "adp.batch_size=4", "adp.warmup_steps=1", "adp.taps=[-1,0]", "adp.pixel_backbone=none",
        "adm.batch_size=4", "adm.warmup_steps=1", "adm.taps=[-1,0]",
        "evaluate.num_seeds=2", "evaluate.num_components=3",
    ]  # fmt: skip
    return load_recipe(RECIPE, [*small, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    return start_run(recipe_of(folder), folder / "run", resume=False)


@pytest.mark.timeout(120)
def test_entries_start_from_the_regression_share_its_pairs_and_are_not_trained_twice(run):
    entries = find_entries("B2,B4")
    result = PictureRace(run, entries, (7, 8), 2)({"command": "x"})
    assert [(one.entry, one.seed) for one in result.runs] == [
        ("B2", 7), ("B4", 7), ("B2", 8), ("B4", 8), ("start", 7),
    ]  # fmt: skip
    assert set(result.runs[0].figures) >= {"style_coverage", "retrieval_top1", "frechet", "diversity"}
    assert (run.out / "race" / "table.md").read_text().count("\n") == 5

    # Two updates each: B4's are one of ADP, then one of ADM from there.
    folder = run.out / "race"
    students = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.glob("B*/*/*/student.safetensors"))
    }
    assert set(students) == {
        f"{stage}/student.safetensors"
        for seed in (7, 8)
        for stage in (f"B2/{seed}/dmd", f"B4/{seed}/adp", f"B4/{seed}/adm")
    }
    steps = [
        json.loads((folder / stage / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        for stage in ("B2/7/dmd", "B4/7/adp", "B4/7/adm")
    ]
    assert steps == [2 + 1, 1 + 1, 1 + 1], "updates and the warm-up"
    start = load_file(run.out / "regression" / "student.safetensors")
    moved = load_file(students["B2/7/dmd/student.safetensors"])
    assert max(float((moved[name] - start[name]).abs().max()) for name in start) < 1e-3, (
        "rate 1e-5, two updates"
    )
    assert any(not torch.equal(moved[name], start[name]) for name in start)

    before = {name: path.stat().st_mtime_ns for name, path in students.items()}
    again = PictureRace(run, entries, (7, 8), 2)({"command": "x"})
    assert {name: path.stat().st_mtime_ns for name, path in students.items()} == before
    assert again.runs == result.runs


@pytest.mark.timeout(120)
@pytest.mark.parametrize("warmup", [1, 3])
def test_a_student_that_moves_every_third_step_moves_as_often_as_the_others(tmp_path, monkeypatch, warmup):
    """With update_ratio 3 it once had a third of their updates."""
    moved = []
    update = Dmd._update_student
    monkeypatch.setattr(Dmd, "_update_student", lambda *args: moved.append(args[1]) or update(*args))
    recipe = recipe_of(tmp_path, "regression=null", "adm.update_ratio=3", f"adm.warmup_steps={warmup}")
    PictureRace(start_run(recipe, tmp_path / "run", resume=False), find_entries("B2"), (7,), 4)(
        {"command": "x"}
    )
    assert moved == [3, 6, 9, 12]


@pytest.mark.timeout(120)
def test_what_was_trained_or_measured_otherwise_is_refused(run):
    """100 moves were once reported as 1000: a student that was there was taken, whatever had made it."""
    entries = find_entries("A1")
    PictureRace(run, entries, (9,), 2)({"command": "x"})
    before = (run.out / "race" / "race.json").read_bytes()
    with pytest.raises(
        RecipeError, match=r"A1/9/regression: was made from a recipe with other regression\.steps;"
    ):
        PictureRace(run, entries, (9,), 4)({"command": "x"})
    measured = run.recipe.evaluate.model_copy(update={"num_seeds": 3})
    other = replace(run, recipe=run.recipe.model_copy(update={"evaluate": measured}))
    with pytest.raises(
        RecipeError, match=r"A1/9/evaluation: was made from a recipe with other evaluate\.num_seeds;"
    ):
        PictureRace(other, entries, (9,), 2)({"command": "x"})
    assert (run.out / "race" / "race.json").read_bytes() == before


def test_a_method_without_a_section_takes_the_nearest_ones_rates_and_guidance(tmp_path):
    recipe = recipe_of(tmp_path)
    made = {stage: section_of(recipe, stage)[1] for stage in ("dmd", "dmd2", "ladd", "lcm")}
    assert made["dmd"].rates == made["dmd2"].rates == recipe.adm.rates
    assert made["dmd"].guidance == recipe.adm.guidance
    assert (made["dmd"].gan_weight, made["dmd2"].gan_weight) == (0.0, 5e-3)
    assert made["dmd2"].taps == recipe.adm.taps
    assert made["ladd"].rates == recipe.adp.rates
    assert (made["lcm"].rate, made["lcm"].guidance) == (recipe.regression.rate, recipe.pairs.guidance)
    own = load_recipe(RECIPE, [DMD])
    assert section_of(own, "dmd2")[1] == own.dmd
    assert section_of(own, "dmd")[1] == own.dmd.model_copy(update={"gan_weight": 0.0})


def test_every_entry_of_the_demos_recipe_has_its_sections_and_one_that_lacks_them_is_told():
    recipe = load_recipe(RECIPE)
    for stage in {stage for entry in ENTRIES for stage in entry.stages}:
        assert section_of(recipe, stage)[1].steps > 0
    with pytest.raises(RecipeError, match="adp: expected a section of that name to race by"):
        section_of(load_recipe(RECIPE, ["adp=null"]), "ladd")
