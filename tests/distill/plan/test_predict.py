"""Predictions against what the CPU's allocator really gave out while the same step ran, counted by torch's profiler."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashbulb_distill.plan import meta
from flashbulb_distill.plan.choose import plan
from flashbulb_distill.plan.meta import Compute, Meter
from flashbulb_distill.plan.outline import KNOWN, outline
from flashbulb_distill.plan.predict import predict
from flashbulb_distill.plan.strategies import strategies_for
from flashbulb_distill.teachers.open import open_teacher
from flashbulb_distill.train.recipe import RecipeError, load_recipe
from support.measured_step import measured
from support.tiny_pipelines import make_tiny_pipeline

RECIPES = Path(__file__).parents[3] / "distill" / "recipes"
# Measured (-s shows it): emoji -0.2 %, emoji adp -0.2 %, sdxl -1.0 %, sd35-large -0.8 %, sd3 as adapters with
# recomputed blocks 0.8 %, cogvideox-5b -9.3 %: there the CPU's three-dimensional convolutions take scratch memory of
# their own, which tiny networks notice. A CPU without bfloat16 takes scratch for two-dimensional ones too: sdxl -4.9 %.
TOLERANCES = {
    "emoji": 0.03,
    "emoji adp": 0.03,
    "emoji in parts": 0.03,
    "emoji adp in parts": 0.03,
    "sdxl": 0.03,
    "sd35-large": 0.03,
    "cogvideox-5b": 0.12,
    "sd3": 0.03,
}


SMALL = ["adm.batch_size=4", "adm.warmup_steps=0", "variant=null"]
IMAGE = [*SMALL, "shape.width=128", "shape.height=128", "adm.taps=[-1,0,1]", "adm.carry_heads=false"]
VIDEO = [*SMALL, "shape.width=64", "shape.height=64", "shape.frames=9", "adm.taps=[-1,1]"]
CASES = {
    "emoji": ("emoji", "adm", SMALL[:2]),
    "emoji adp": ("emoji", "adp", ["adp.batch_size=8", "adp.pixel_batch=4", "adp.warmup_steps=0"]),
    "emoji in parts": ("emoji", "adm", [*SMALL[:2], "memory.micro_batch=2"]),
    "emoji adp in parts": (
        "emoji",
        "adp",
        ["adp.batch_size=8", "adp.pixel_batch=4", "adp.warmup_steps=0", "memory.micro_batch=3"],
    ),
    "sdxl": ("sdxl_1step", "adm", IMAGE),
    "sd35-large": ("sd35_large_4step", "adm", IMAGE),
    "cogvideox-5b": ("cogvideox_5b_8step", "adm", VIDEO),
    "sd3": (
        "sd3_medium_4step",
        "adm",
        [*IMAGE, "roles.student=lora", "roles.fake=lora", "lora.rank=4", "memory.checkpointing=true"],
    ),
}


def recipe_of(case, tmp_path, *overrides):
    name, stage, options = CASES[case]
    if not name.startswith("emoji"):
        options = [*options, f"teacher={make_tiny_pipeline(tmp_path / 'teacher', case)}"]
    return load_recipe(RECIPES / f"{name}.yaml", [*options, *overrides]), stage


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        ("emoji", "bfloat16"),
        ("emoji adp", "float32"),
        ("emoji in parts", "float32"),
        ("emoji adp in parts", "float32"),
        ("sdxl", "bfloat16"),
        ("sd35-large", "float32"),
        ("cogvideox-5b", "float32"),
        ("sd3", "float32"),
    ],
)
def test_the_predicted_peak_is_the_measured_one(case, precision, tmp_path):
    recipe, stage = recipe_of(case, tmp_path, f"precision={precision}")
    expected = measured(recipe, stage)["working"]
    told = predict(recipe, stage, for_cuda=False).working_bytes
    difference = told / expected - 1
    print(f"{case} {precision}: measured {expected}, predicted {told} bytes, {difference:+.1%}")
    emulated = precision == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert abs(difference) < TOLERANCES[case] + 0.04 * emulated


def test_recomputed_blocks_need_less_and_compute_more_and_adapters_share_one_backbone(tmp_path):
    recipe, stage = recipe_of("sd35-large", tmp_path, "adm.batch_size=16", "lora.rank=4")
    plain = predict(recipe, stage)
    again = predict(
        recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"checkpointing": True})}), stage
    )
    assert again.working_bytes < 0.9 * plain.working_bytes
    assert 1.05 < again.step_flops / plain.step_flops < 1.5
    adapters = recipe.roles.model_copy(update={"student": "lora", "fake": "lora"})
    shared = predict(recipe.model_copy(update={"roles": adapters}), stage)
    assert shared.parameters["student"] < 0.5 * plain.parameters["student"]
    assert shared.average_bytes < 0.5 * plain.average_bytes


def test_memory_and_operations_grow_in_a_straight_line_with_the_batch(tmp_path):
    """What the choice of a batch size rests on."""
    recipe, stage = recipe_of("sd35-large", tmp_path)
    at = {
        size: predict(
            recipe.model_copy(update={stage: recipe.adm.model_copy(update={"batch_size": size})}), stage
        )
        for size in (2, 4, 16)
    }
    line = at[2].working_bytes + 7 * (at[4].working_bytes - at[2].working_bytes)
    assert line == pytest.approx(at[16].working_bytes, rel=0.02)
    assert at[2].step_flops + 7 * (at[4].step_flops - at[2].step_flops) == pytest.approx(
        at[16].step_flops, rel=0.01
    )


def test_operations_are_those_of_torchs_own_counter(tmp_path):
    recipe, _ = recipe_of("sd35-large", tmp_path, "precision=float32")
    real = open_teacher(recipe.family, recipe.teacher, shape=recipe.shape)
    cond = real.encode(["a red dog", "dog"])
    xt, t = torch.randn(2, *real.latent_shape), torch.full((2,), 0.5)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        real.denoiser(xt, t, cond)
    meter = Meter()
    with torch.no_grad(), Compute(), meter:
        outline(recipe).denoiser(xt.to("meta"), t.to("meta"), cond.to(torch.device("meta")))
    assert meter.flops == counter.get_total_flops()


def test_no_step_is_run_when_what_stays_is_too_much(tmp_path):
    recipe, stage = recipe_of("sd35-large", tmp_path)
    assert predict(recipe, stage, 1000).working_bytes is None


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("sdxl_1step", 2567.5),
        ("sd3_medium_4step", 2028.3),
        ("sd35_large_4step", 8056.6),
        ("cogvideox_2b_8step", 1693.8),
        ("cogvideox_5b_8step", 5570.3),
    ],
)
def test_the_known_configurations_are_those_of_the_published_sizes(name, millions):
    """Parameters of the checkpoints, as their model pages round them: 2.6, 2, 8.1, 1.7 and 5.6 thousand millions."""
    teacher = outline(load_recipe(RECIPES / f"{name}.yaml"))
    assert sum(p.numel() for p in teacher.denoiser.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert next(teacher.denoiser.parameters()).device.type == "meta"


def test_an_unknown_hub_id_is_refused_with_those_that_are_known():
    recipe = load_recipe(RECIPES / "sdxl_1step.yaml", ["teacher=somebody/unknown"])
    with pytest.raises(RecipeError, match="a folder with its JSON files is enough") as refusal:
        outline(recipe)
    assert all(hub_id in str(refusal.value) for hub_id in KNOWN)


@pytest.mark.parametrize("case", ["emoji adp in parts", "sd3"])
def test_what_is_known_of_a_call_is_what_torch_says_of_it(case, tmp_path, monkeypatch):
    """Shapes are worked out once for each kind of call: not a byte and not an operation may differ for it."""
    recipe, stage = recipe_of(case, tmp_path)
    known = predict(recipe, stage)
    monkeypatch.setattr(meta, "_is_fresh", lambda func: False)
    assert predict(recipe, stage) == known


@pytest.mark.parametrize("gpus", [1, 2])
def test_rows_that_the_pixel_discriminator_does_not_see_cost_no_look(gpus):
    """A plan of SDXL once took the decoder's work for all 128 rows, of which 16 are decoded."""
    options = ["adp.batch_size=16", "adp.pixel_batch=6", "adp.warmup_steps=0"]
    recipe = load_recipe(RECIPES / "emoji.yaml", options)
    made = plan(
        recipe, "adp", 2**40, lambda r, s, b: predict(r, s, b, gpus=gpus), strategies_for(1)[:1], gpus=gpus
    )
    one = [f"adp.batch_size={16 // gpus}", f"adp.pixel_batch={6 // gpus}"]
    told = predict(load_recipe(RECIPES / "emoji.yaml", [*options, *one]), "adp", gpus=gpus)
    assert made.choice.step_flops == pytest.approx(told.step_flops, rel=1e-6)
    # Measured: 14 % too much for one GPU. What is alive at the peak is not of one moment for all numbers of rows.
    assert 1 <= made.choice.working_bytes / told.working_bytes < 1.2
