"""Which strategy is chosen: a pure function of predictions."""

from pathlib import Path

import pytest

from flashbulb_distill.plan.choose import GIB, STRATEGIES, hours, plan, read_bytes, table, usable
from flashbulb_distill.plan.predict import Prediction
from flashbulb_distill.train.recipe import load_recipe

RECIPES = Path(__file__).parents[3] / "distill" / "recipes"
RECIPE = load_recipe(RECIPES / "sdxl_1step.yaml", ["adm.batch_size=16"])


def predicted(recipe, stage, budget):
    """A network of 2 GiB: whole roles cost 4 more GiB each with their moments, adapters nothing; 1 GiB a sample."""
    whole = [recipe.roles.student, recipe.roles.fake].count("full")
    per_sample = GIB // 4 if recipe.memory.checkpointing else GIB
    size = recipe.stages[stage].batch_size
    resident = 2 * GIB + whole * 6 * GIB
    return Prediction(
        stage=stage,
        batch_size=size,
        steps=1000,
        parameters={"teacher": 10},
        trainable={},
        weight_bytes={"all": 2 * GIB + whole * 2 * GIB},
        optimizer_bytes={"all": whole * 4 * GIB},
        average_bytes=0,
        gradient_bytes=0,
        working_bytes=size * per_sample if resident <= budget else None,
        step_flops=size * 10**15,
    )


@pytest.mark.parametrize(
    ("gib", "strategy", "batch"),
    [
        (80, "full", 16),
        (24, "full, checkpointing", 16),
        (18, "full, checkpointing, 8-bit Adam", 16),
        (14, "LoRA student, full fake, checkpointing", 16),
        (8, "LoRA both, checkpointing", 16),
        (5, "LoRA both, checkpointing", 8),
    ],
)
def test_the_first_strategy_that_fits_with_the_recipes_batch_is_taken(gib, strategy, batch):
    made = plan(RECIPE, "adm", gib * GIB, predicted)
    assert (made.choice.strategy.name, made.choice.batch_size) == (strategy, batch)
    assert made.choice.total_bytes <= usable(gib * GIB)
    assert strategy in made.reason
    assert f"adm.batch_size={batch}" in table(made)


def test_nothing_fits_and_it_says_what_would():
    made = plan(RECIPE, "adm", 2 * GIB, predicted)
    assert made.choice is None
    assert "nothing fits" in made.reason
    assert "LoRA both, checkpointing, needs 2.0 GiB before its first activation" in made.reason
    assert len(made.rows) == len(STRATEGIES)


def test_time_is_operations_over_a_share_of_the_peak():
    made = plan(RECIPE, "adm", 80 * GIB, predicted)
    assert hours(made)["A100 SXM 80 GB"] == pytest.approx(16e15 * 24000 / (312e12 * 0.35) / 3600)


def test_the_overrides_are_ones_that_a_recipe_takes():
    path = Path(__file__).parents[3] / "distill/recipes/sdxl_1step.yaml"
    for strategy in STRATEGIES:
        changed = load_recipe(path, list(strategy.overrides("adm", 4)))
        assert (changed.roles.student, changed.roles.fake) == strategy.roles
        assert changed.memory.checkpointing == strategy.checkpointing
        assert changed.adm.batch_size == 4


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_planned_of_any_recipe_is_a_recipe_too(path):
    """A plan of SD3.5 Large once died in IDA, which pulls the fake score to the student: a whole one to an adapter."""
    recipe = load_recipe(path, ["memory.optimizer=adamw8bit"])
    tried = []

    def never_fits(changed, stage, budget):
        tried.append(changed)
        return predicted(changed, stage, 0)

    for stage in recipe.stages:
        rows = plan(recipe, stage, GIB, never_fits).rows
        assert {"full", "LoRA both, checkpointing"} <= {row.strategy.name for row in rows}
        for row in rows:
            load_recipe(path, list(row.strategy.overrides(stage, 2)))
    for changed in tried:
        type(changed).model_validate(changed.model_dump())
        assert changed.memory.optimizer == "adamw"  # 8 bits are a quarter of that, and need no GPU to tell


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), ("1.5GiB", 3 * GIB // 2)]
)
def test_sizes_are_read(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "24gb", "x24GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="expected a memory size like 24GiB"):
        read_bytes(text)
