"""A run may go on from a student instead of the teacher."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from flashbulb_distill.errors import UsageError
from flashbulb_distill.plan.predict import predict
from flashbulb_distill.ranks import Ranks
from flashbulb_distill.run import start_run
from flashbulb_distill.teachers.emoji import load_emoji_teacher
from flashbulb_distill.train import trainer
from flashbulb_distill.train.build import check_here
from flashbulb_distill.train.checkpoint import checkpoints
from flashbulb_distill.train.recipe import RecipeError, load_recipe
from support.tiny_pipelines import make_tiny_pipeline
from support.tiny_teacher import make_tiny_motion_teacher, make_tiny_teacher

RECIPE = Path(__file__).parents[3] / "distill" / "recipes" / "emoji.yaml"


@pytest.fixture
def overrides(tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple\nrocket\n")
    return [
        f"teacher={make_tiny_teacher(tmp_path / 'teacher')}", f"prompts={tmp_path / 'prompts.txt'}",
        "precision=float32", "pairs.count=4", "pairs.num_steps=2", "pairs.batch_size=4",
        "regression.steps=1", "regression.decay_steps=0", "regression.batch_size=2", "regression.rate=1e-6",
        "guard=null", "adp=null", "adm=null", "evaluate=null",
    ]  # fmt: skip


def test_the_first_stage_goes_on_from_the_weights_of_the_folder(overrides, tmp_path):
    start = make_tiny_teacher(tmp_path / "start", seed=1)
    from_teacher = start_run(load_recipe(RECIPE, overrides), tmp_path / "one", resume=False)
    from_student = start_run(
        load_recipe(RECIPE, [*overrides, f"start={start}"]), tmp_path / "two", resume=False
    )
    assert from_teacher.regression() != from_student.regression(), "what it began from is part of what it is"
    weights = load_file(start / "transformer" / "diffusion_pytorch_model.safetensors")
    values = {name: value for name, value in weights.items() if name != "pos_embed.pos_embed"}
    trained = load_file(from_student.out / "regression" / "student.safetensors")
    assert trained.keys() == {f"transformer.{name}" for name in values}
    for name, value in values.items():
        # One step of Adam moves a weight by its rate at most; the teacher's weights are far further.
        torch.testing.assert_close(trained[f"transformer.{name}"], value, rtol=0, atol=3e-6)
    moved = load_file(from_teacher.out / "regression" / "student.safetensors")
    assert any((moved[name] - trained[name]).abs().max() > 0.1 for name in moved)
    # The pairs are the teacher's in both.
    pairs = [(run.out / "pairs" / "index.jsonl").read_text() for run in (from_teacher, from_student)]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("adp.taps=[7]", r"^adp\.taps: expected -1 \(the input\) to 1, the last block, got 7"),
        ("adm.taps=[7]", r"^adm\.taps: expected -1 \(the input\) to 1, the last block, got 7"),
        (
            "adp.pixel_taps=[99]",
            r"^adp\.pixel_taps: expected ascending block indices from 0 to 15, got \(99,\)",
        ),
        ("adp.pixel_backbone=sam", r"^adp\.pixel_source: expected a folder or hub id for sam"),
        ("roles.student=lora lora.targets=none", r"^lora\.targets: expected the name of a linear layer"),
        ("roles.fake=lora lora.targets=none", r"^lora\.targets: expected the name of a linear layer"),
        ("memory.optimizer=adamw8bit", r"^memory\.optimizer: expected bitsandbytes for adamw8bit"),
        ('guard={"bands":"/nowhere.json"}', r"^guard\.bands: expected a JSON file of bands, found no /nowh"),
        (
            'variety={"variants":"/nowhere.json","steps":1,"batch_size":2,"rate":1e-4,"code_rate":1e-3}',
            r"^variety\.variants: expected a JSON file of prompts, found no /nowhere\.json",
        ),
        ('evaluate={"reference":"/nowhere"}', r"^expected the real pictures as .* in /nowhere"),
    ],
)
def test_what_a_later_stage_could_not_do_with_is_refused_before_the_pairs(
    overrides, tmp_path, monkeypatch, change, message
):
    """A mistake in the section of ADM came out after all pairs and all of ADP were made."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    fitting = [one for one in overrides if one not in ("adp=null", "adm=null")]
    fitting += ["adp.taps=[0]", "adm.taps=[0]"]
    with pytest.raises(UsageError, match=message):
        start_run(load_recipe(RECIPE, [*fitting, *change.split()]), tmp_path / "run", resume=False).evaluate()
    assert not list((tmp_path / "run").rglob("*.json*")), "so that the mended recipe may take the folder"


@pytest.mark.parametrize("change", ["shape.width=60", "loras=[nowhere.safetensors]"])
def test_what_is_wrong_with_the_teacher_is_not_told_of_a_stage(change, tmp_path):
    """It read "adp.shape: expected multiples of 8", a key that no recipe has."""
    (tmp_path / "prompts.txt").write_text("red\n")
    overrides = [
        f"teacher={make_tiny_pipeline(tmp_path / 'teacher', 'sdxl')}", f"prompts={tmp_path / 'prompts.txt'}",
        "precision=float32", "variant=null", "shape.width=64", "shape.height=64", "adp.taps=[0]", "adm.taps=[0]",
        "adp.pixel_backbone=lite0", "adp.pixel_taps=[0]", change,
    ]  # fmt: skip
    recipe = load_recipe(RECIPE.with_name("sdxl_1step.yaml"), overrides)
    with pytest.raises(UsageError, match=f"^{change.partition('=')[0].partition('.')[0]}: expected"):
        start_run(recipe, tmp_path / "run", resume=False).adp()


def test_batches_that_the_processes_cannot_share_are_refused(overrides, tmp_path):
    teacher = load_emoji_teacher(tmp_path / "teacher")
    three = [one for one in overrides if one != "adp=null"]
    three += ["regression.batch_size=6", "adp.batch_size=6", "adp.taps=[0]", "adp.pixel_batch=4"]
    for change, message in (
        ("adp.pixel_backbone=none", None),
        ("seed=7", r"^adp\.pixel_batch: expected a batch size that 3 processes"),
        ("regression.batch_size=2", r"^regression\.batch_size: expected .* share equally, got 2"),
    ):
        recipe = load_recipe(RECIPE, [*three, change])
        with pytest.raises(RecipeError, match=message) if message else nullcontext():
            check_here(recipe, teacher, Ranks(0, 3), recipe.stages)


def test_what_is_done_or_not_asked_for_is_not_checked(overrides, tmp_path, monkeypatch):
    """Pairs, and ADM behind an ADP that was done, were refused for a batch and a backbone that nobody needed."""

    class Three(Ranks):
        def first(self, work):
            return work()

        def gather(self, value):
            return [value]

    def gone(*args, **options):
        raise FileNotFoundError("pixel_source: expected a sam model, found none")

    class Reached(Exception):
        pass

    def reached(stage, inputs):
        raise Reached(stage)

    fitting = [one for one in overrides if one not in ("adp=null", "adm=null")]
    fitting += [f"{stage}.{key}" for stage in ("adp", "adm") for key in ("taps=[0]", "steps=1")]
    fitting += ["adp.warmup_steps=0", "adp.batch_size=4", "adp.pixel_batch=2", "adm.batch_size=6"]
    recipe, three = load_recipe(RECIPE, fitting), Three(0, 3)
    start_run(recipe, tmp_path / "run", resume=False).adp()
    monkeypatch.setattr("flashbulb_distill.train.build.load_pixel_backbone", gone)
    monkeypatch.setattr("flashbulb_distill.run.build", reached)
    start_run(recipe, tmp_path / "pairs", resume=False, ranks=three).pairs()
    with pytest.raises(Reached, match="adm"):
        start_run(recipe, tmp_path / "run", resume=True, ranks=three).adm()
    with pytest.raises(RecipeError, match=r"^regression\.batch_size: expected .* share equally, got 2"):
        start_run(recipe, tmp_path / "pairs", resume=True, ranks=three).adm()
    with pytest.raises(RecipeError, match=r"^adp\.pixel_source: expected a sam model"):
        start_run(recipe, tmp_path / "pairs", resume=True).adm()


def test_checkpoints_are_as_far_apart_as_the_recipe_says(overrides, tmp_path, monkeypatch):
    """Seventy gigabytes were written every hundred steps of SDXL, whatever the recipe said."""
    steps = []
    kept = trainer.save_checkpoint
    monkeypatch.setattr(
        trainer,
        "save_checkpoint",
        lambda folder, step, *args, **options: steps.append(step) or kept(folder, step, *args, **options),
    )
    rarely = [*overrides, "regression.steps=5", "save_every=2"]
    recipe = load_recipe(RECIPE, rarely)
    start_run(recipe, tmp_path / "run", resume=False).regression()
    assert steps == [2, 4, 5]
    told = predict(recipe, "regression").checkpoint_bytes
    for path in checkpoints(tmp_path / "run" / "regression"):
        head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - head == told


def test_networks_of_another_kind_or_size_are_another_run(overrides, tmp_path):
    """The stage is not taken for done, nor gone on with, when the networks are no longer what they were."""
    lora = [*overrides, "roles.student=lora", "regression.rate=1e-3", "lora.rank=2"]
    start_run(load_recipe(RECIPE, lora), tmp_path / "lora", resume=False).regression()
    for change in ("lora.alpha=32", "roles.student=full"):
        changed = start_run(load_recipe(RECIPE, [*lora, change]), tmp_path / "lora", resume=True)
        with pytest.raises(RecipeError, match=f"a recipe with other {change.partition('=')[0]};"):
            changed.regression()
    start_run(load_recipe(RECIPE, overrides), tmp_path / "full", resume=False).regression()
    for change in ("lora.alpha=32", "roles.fake=lora"):  # no adapter and no fake score here
        start_run(load_recipe(RECIPE, [*overrides, change]), tmp_path / "full", resume=True).regression()


def test_pairs_of_another_size_are_not_taken_for_these(tmp_path):
    (tmp_path / "prompts.txt").write_text("red\n")
    overrides = [
        f"teacher={make_tiny_pipeline(tmp_path / 'teacher', 'sdxl')}", f"prompts={tmp_path / 'prompts.txt'}",
        "precision=float32", "variant=null", "pairs.count=1", "pairs.num_steps=1", "shape.height=64",
    ]  # fmt: skip
    recipes = [
        load_recipe(RECIPE.with_name("sdxl_1step.yaml"), [*overrides, f"shape.width={w}"]) for w in (64, 32)
    ]
    start_run(recipes[0], tmp_path / "run", resume=False).pairs()
    with pytest.raises(RecipeError, match=r"a recipe with other shape\.width;"):
        start_run(recipes[1], tmp_path / "run", resume=True).pairs()


def test_what_made_a_run_is_written_when_it_begins_and_the_doctor_may_come_before(
    overrides, tmp_path, monkeypatch
):
    recipe, out = load_recipe(RECIPE, [*overrides, "report.prompts=0"]), tmp_path / "run"
    monkeypatch.setattr("flashbulb_distill.run.code_version", lambda: "first")
    start_run(recipe, out, resume=True).doctor()
    start_run(recipe, out, resume=False).regression()
    monkeypatch.setattr("flashbulb_distill.run.code_version", lambda: "second")
    start_run(recipe, out, resume=True).report()
    assert json.loads((out / "recipe.json").read_text())["commit"] == "first", "the report made nothing of it"
    stage = out / "regression" / "stage.json"
    stage.write_text(stage.read_text().replace('"done": true', '"done": false'))
    start_run(recipe, out, resume=True).regression()
    assert json.loads((out / "recipe.json").read_text())["commit"] == "first", "it had begun before"
    with pytest.raises(RecipeError, match="--resume"):
        start_run(recipe, out, resume=False)


def test_the_doctor_does_not_make_a_start_that_fits_another_network(overrides, tmp_path):
    """Its fake score, an adapter, renames the teacher's layers, with which the start was compared afterwards."""
    start = make_tiny_teacher(tmp_path / "start", seed=1)
    changes = [one for one in overrides if not one.startswith("adm") and not one.startswith("regression")]
    changes += ["regression=null", "adm.taps=[0]", "adm.batch_size=2", "adm.steps=1", "adm.warmup_steps=0"]
    recipe = load_recipe(RECIPE, [*changes, "roles.fake=lora", f"start={start}"])
    run = start_run(recipe, tmp_path / "run", resume=False)
    run.doctor()
    run.adm()
    assert (run.out / "adm" / "student.safetensors").is_file()


def test_a_start_that_does_not_fit_is_refused_in_one_line(overrides, tmp_path):
    with pytest.raises(RecipeError, match=r"start: expected roles\.student full"):
        load_recipe(RECIPE, [*overrides, "start=anywhere", "roles.student=lora"])
    other = make_tiny_teacher(tmp_path / "other")
    config = other / "transformer" / "config.json"
    SD3Transformer2DModel(**{**json.loads(config.read_text()), "num_layers": 3}).save_pretrained(
        config.parent
    )
    starts = {
        tmp_path / "nowhere": r"transformer/config\.json, found none",
        make_tiny_motion_teacher(tmp_path / "motion"): "expected shape",
        other: "a network of other parameters",
    }
    for number, (start, message) in enumerate(starts.items()):
        run = start_run(
            load_recipe(RECIPE, [*overrides, f"start={start}"]), tmp_path / str(number), resume=False
        )
        with pytest.raises(
            RecipeError, match=f"start: expected the folder of a student of .*{message}"
        ) as caught:
            run.regression()
        assert "\n" not in str(caught.value)
        assert not (run.out / "pairs").exists(), "it is refused before pairs are made"
