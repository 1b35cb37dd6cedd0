"""Which strategy is chosen: a pure function of predictions."""

from pathlib import Path

import pytest

from flashbulb_distill.plan.choose import GIB, plan, plan_stages, usable
from flashbulb_distill.plan.predict import Prediction
from flashbulb_distill.plan.strategies import LORA_RATE, LORA_RATE_FROM, strategies_for
from flashbulb_distill.plan.text import hours, read_bytes, table
from flashbulb_distill.train.recipe import load_recipe

RECIPES = Path(__file__).parents[3] / "distill" / "recipes"
RECIPE = load_recipe(RECIPES / "sdxl_1step.yaml", ["adm.batch_size=16"])


def predicted(recipe, stage, budget):
    """A network of 2 GiB: whole roles cost 4 more GiB each with their moments, adapters nothing; 1 GiB a row at once.

    In parts gradients wait (1 GiB) and each row is kept (1/16 GiB). Shared out over 4 GPUs, a quarter stays.
    """
    whole = [recipe.roles.student, recipe.roles.fake].count("full")
    a_row = GIB // 4 if recipe.memory.checkpointing else GIB
    size = recipe.stages[stage].batch_size
    at_once = recipe.memory.micro_batch or size
    part = 4 if recipe.memory.sharding == "fsdp" else 1
    resident = (2 * GIB + whole * 6 * GIB) // part
    waiting = GIB + size * GIB // 16 if at_once < size else 0
    return Prediction(
        stage=stage,
        batch_size=size,
        steps=1000,
        parameters={"teacher": 10},
        trainable={},
        weight_bytes={"all": (2 * GIB + whole * 2 * GIB) // part},
        optimizer_bytes={"all": whole * 4 * GIB // part},
        average_bytes=0,
        gradient_bytes=0,
        checkpoint_bytes=(3 + whole * 6) * GIB,
        working_bytes=at_once * a_row + waiting if resident <= budget else None,
        step_flops=size * 10**15 * (5 if at_once < size else 4) // 4,
    )


@pytest.mark.parametrize(
    ("gib", "strategy", "rows"),
    [
        (80, "full", 16),
        (24, "full, checkpointing", 16),
        (18, "full, checkpointing", 2),  # 14 stay, 1 waits, 1 is kept: rather this than coarser moments
        (14, "LoRA student, full fake, checkpointing", 16),
        (8, "LoRA both, checkpointing", 16),
        (5.5, "LoRA both, checkpointing", 2),
    ],
)
def test_what_learns_most_is_taken_and_computes_as_many_rows_at_once_as_fit(gib, strategy, rows):
    made = plan(RECIPE, "adm", int(gib * GIB), predicted)
    assert (made.choice.strategy.name, made.choice.rows) == (strategy, rows)
    assert made.choice.total_bytes <= usable(int(gib * GIB))
    assert strategy in made.reason
    assert f"memory.micro_batch={'null' if rows == 16 else rows}" in table(made)
    assert ("the gradient is the whole batch's" in made.reason) == (rows < 16)


@pytest.mark.parametrize(
    ("gib", "strategy", "rows"),
    [
        (24, "full", 4),  # a GPU has 4 of 16 rows: no sharing needed
        (12, "full, shared out", 4),
        (6, "full, checkpointing, shared out", 4),
    ],
)
def test_several_gpus_share_the_batch_and_where_it_is_needed_the_networks(gib, strategy, rows):
    made = plan(RECIPE, "adm", gib * GIB, predicted, gpus=4)
    assert (made.choice.strategy.name, made.choice.rows) == (strategy, rows)
    shown = table(made)
    assert f"memory.sharding={'fsdp' if 'shared' in strategy else 'none'}" in shown
    assert "not measured on several GPUs" in shown
    assert f"4 GPUs of {gib} GiB each" in shown
    assert not any(s.eight_bit and s.sharding == "fsdp" for s in strategies_for(4))


def test_parts_cost_time_and_are_told_from_predictions_of_parts():
    made = plan(RECIPE, "adm", 18 * GIB, predicted)
    # Two rows at once, gradients that wait, all sixteen kept.
    assert made.choice.working_bytes == 2 * GIB // 4 + GIB + 16 * GIB // 16
    assert made.choice.step_flops == 16 * 10**15 * 5 // 4


def test_a_batch_that_the_gpus_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"--gpus: expected a number that shares adm\.batch_size, 16, got 3"):
        plan(RECIPE, "adm", 80 * GIB, predicted, gpus=3)


def test_nothing_fits_and_it_says_what_would():
    made = plan(RECIPE, "adm", 2 * GIB, predicted)
    assert made.choice is None
    assert "nothing fits" in made.reason
    assert "LoRA both, checkpointing, needs 2.0 GiB before its first activation" in made.reason
    assert len(made.rows) == len(strategies_for(1))


def test_time_is_operations_over_a_share_of_the_peak():
    made = plan(RECIPE, "adm", 80 * GIB, predicted)
    assert hours(made)["A100 SXM 80 GB"] == pytest.approx(16e15 * 24000 / (312e12 * 0.35) / 3600)
    quarter = plan(RECIPE, "adm", 80 * GIB, predicted, gpus=4)
    assert hours(quarter)["A100 SXM 80 GB"] == pytest.approx(hours(made)["A100 SXM 80 GB"] / 4)


def test_the_disk_that_checkpoints_take_is_told():
    """SDXL's are 72 GB each, and nothing told it; every hundred steps, and no recipe could change that."""
    shown = table(plan(RECIPE, "adm", 80 * GIB, predicted))
    assert "a checkpoint of 15.0 GiB every 100 steps (save_every) and every 100 (guard.every)" in shown
    assert "up to 4 at a time, 60.0 GiB; 3,615 GiB written in all" in shown, "24,000 steps, and the start"
    rarely = load_recipe(RECIPES / "sdxl_1step.yaml", ["adm.batch_size=16", "save_every=1000", "guard=null"])
    shown = table(plan(rarely, "adm", 80 * GIB, predicted))
    assert "every 1000 steps (save_every), up to" in shown
    assert "up to 3 at a time, 45.0 GiB; 360 GiB" in shown
    both = load_recipe(RECIPES / "sdxl_1step.yaml", ["adm.steps=3010", "save_every=100", "guard.every=150"])
    # 30 and 20 of which 10 are one, the start and the end.
    assert plan(both, "adm", 80 * GIB, predicted).written == 30 + 20 - 10 + 2
    coarse = next(s for s in strategies_for(1) if s.eight_bit)
    eight = plan(RECIPE, "adm", 80 * GIB, predicted, [coarse]).choice
    assert (
        eight.checkpoint_bytes == 7 * GIB + 2 * GIB + 8 * GIB // 1024
    )  # a quarter of 8 GiB of moments, and scales


def test_the_overrides_are_ones_that_a_recipe_takes():
    path = Path(__file__).parents[3] / "distill/recipes/sdxl_1step.yaml"
    for strategy in strategies_for(2):
        changed = load_recipe(path, list(strategy.overrides(load_recipe(path), 4)))
        assert (changed.roles.student, changed.roles.fake) == strategy.roles
        assert changed.memory.checkpointing == strategy.checkpointing
        assert changed.memory.sharding == strategy.sharding
        assert changed.memory.micro_batch == 4


def test_the_recipes_own_roles_are_kept_where_they_fit():
    """SD3 Medium's student is an adapter at an adapter's rate; the plan made it whole and left the rate."""
    recipe = load_recipe(RECIPES / "sd3_medium_4step.yaml", ["adm.batch_size=16"])
    large, small = (plan(recipe, "adm", gib * GIB, predicted) for gib in (80, 8))
    assert large.choice.strategy.name == "LoRA student, full fake"
    assert not large.rates
    assert small.choice.strategy.name == "LoRA both, checkpointing"
    assert small.rates == ("adm.rates.fake=5e-05",), "the student's is an adapter's already"


def test_what_becomes_an_adapter_is_given_an_adapters_rate():
    path = RECIPES / "sdxl_1step.yaml"
    made = plan(RECIPE, "adm", 8 * GIB, predicted)
    assert set(made.rates) < set(made.overrides)
    assert LORA_RATE_FROM in table(made)
    assert all(f"--set {rate}" in table(made) for rate in made.rates)
    changed = load_recipe(path, list(made.overrides))
    for rates in (changed.adp.rates, changed.adm.rates):  # roles are the whole run's
        assert rates.student == LORA_RATE
    assert changed.adm.rates.fake == LORA_RATE
    whole = plan(RECIPE, "adm", 80 * GIB, predicted)
    assert not whole.rates
    assert LORA_RATE_FROM not in table(whole)
    emoji = load_recipe(RECIPES / "emoji.yaml")  # whose regression and fake score have higher rates
    rates = plan(emoji, "regression", 8 * GIB, predicted).rates
    assert rates == ("adp.rates.student=5e-05", "adm.rates.student=5e-05")


def test_all_stages_of_a_run_are_planned_with_one_pair_of_roles():
    """On one H100 a run of SDXL was told to train ADP's student as an adapter and ADM's whole."""

    def adp_is_larger(recipe, stage, budget):
        made = predicted(recipe, stage, budget)
        more = 10 * GIB if stage == "adp" else 0
        return made.model_copy(update={"weight_bytes": {"all": made.weight_bytes["all"] + more}})

    recipe = load_recipe(RECIPES / "sdxl_1step.yaml", ["adm.batch_size=16", "adp.batch_size=16"])
    alone = plan(recipe, "adm", 20 * GIB, adp_is_larger)
    adp, adm = plan_stages(recipe, ["adp", "adm"], 20 * GIB, adp_is_larger)
    assert alone.choice.strategy.roles == ("full", "full") != adp.choice.strategy.roles
    assert adm.choice.strategy.roles == adp.choice.strategy.roles
    assert "full, checkpointing, 8-bit Adam would fit this stage alone" in adm.reason
    assert adm.overrides[: 2 + len(adm.rates)] == adp.overrides[: 2 + len(adp.rates)]
    assert plan_stages(recipe, ["adm"], 20 * GIB, adp_is_larger) == [alone]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_planned_of_any_recipe_is_a_recipe_too(path):
    """A plan of SD3.5 Large once died in IDA, which pulls the fake score to the student: a whole one to an adapter."""
    _plans_are_recipes(path, "memory.optimizer=adamw8bit")


def test_what_is_planned_of_a_student_with_variety_from_the_teacher_is_a_recipe_too():
    _plans_are_recipes(RECIPES / "emoji_variety.yaml", "memory.optimizer=adamw8bit", "start=null")


def _plans_are_recipes(path, *given):
    recipe = load_recipe(path, given)
    tried = []

    def never_fits(changed, stage, budget):
        tried.append(changed)
        return predicted(changed, stage, 0)

    for stage in recipe.stages:
        for gpus in (1, 2):
            rows = plan(recipe, stage, GIB, never_fits, gpus=gpus).rows
            names = {row.strategy.name for row in rows}
            assert rows[0].strategy.roles == (recipe.roles.student, recipe.roles.fake)
            may_adapt = recipe.start is None and recipe.variety is None
            assert ("LoRA both, checkpointing" in names) == may_adapt, "whole weights are no adapter's"
            for row in rows:
                load_recipe(path, [*given, *row.strategy.overrides(recipe, 2)])
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
