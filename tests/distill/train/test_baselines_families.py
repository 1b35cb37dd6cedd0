"""DMD2, LADD and LCM train students of the families that people own, by a recipe's sections alone."""

import json
from pathlib import Path

import pytest

from flashbulb_distill.run import start_run
from flashbulb_distill.train.recipe import load_recipe
from support.tiny_pipelines import make_tiny_pipeline

RECIPES = Path(__file__).parents[3] / "distill" / "recipes"
RATES = "{student: 1e-4, heads: 1e-3, fake: 1e-4}"
PAIRS = "pairs={count: 4, num_steps: 2, guidance: 2.0, batch_size: 2}"
CASES = {
    "sdxl": ("sdxl_1step", []),
    "cogvideox-2b": ("cogvideox_2b_8step", ["shape.frames=9"]),
}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("family", CASES)
def test_a_chain_of_them_goes_from_teacher_to_student(family, tmp_path):
    name, overrides = CASES[family]
    teacher = make_tiny_pipeline(tmp_path / "teacher", family)
    (tmp_path / "prompts.txt").write_text("a red dog\nred\n")
    stages = [
        f"dmd={{steps: 2, batch_size: 2, rates: {RATES}, guidance: 2, gan_weight: .1, taps: [-1, 1], fake_updates: 1}}",
        f"ladd={{steps: 2, batch_size: 2, rates: {RATES}, taps: [-1, 1]}}",
        "lcm={steps: 2, batch_size: 2, rate: 1e-4, guidance: 2.0, num_times: 4}",
    ]
    given = [f"teacher={teacher}", f"prompts={tmp_path / 'prompts.txt'}", "precision=float32", "variant=null"]
    size = ["shape.width=64", "shape.height=64", *overrides]
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*given, *size, "adp=null", "adm=null", PAIRS, *stages])
    run = start_run(recipe, tmp_path / "run", resume=False)
    run.lcm()
    for stage in ("dmd", "ladd", "lcm"):
        last = json.loads((run.out / stage / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["student_norm"] > 0, stage
        assert (run.out / stage / "student.safetensors").stat().st_size > 0
