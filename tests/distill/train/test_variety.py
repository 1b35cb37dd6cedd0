"""The stage variety: open prompts learn their variants' pictures, and the noise chooses which."""

import json
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kstest, norm

from flashbulb_distill.bundle import open_bundle
from flashbulb_distill.plan.predict import predict
from flashbulb_distill.ranks import ALONE, Ranks
from flashbulb_distill.run import start_run
from flashbulb_distill.teachers.denoiser import Condition
from flashbulb_distill.teachers.emoji import load_emoji_teacher
from flashbulb_distill.teachers.noise_code import NoiseCode, place_of
from flashbulb_distill.train import trainer
from flashbulb_distill.train.build import Inputs, build, student_of, with_code
from flashbulb_distill.train.fake import pull
from flashbulb_distill.train.recipe import RecipeError, load_recipe
from flashbulb_distill.train.variety import Variants, Variety
from support.tiny_teacher import make_tiny_teacher

RECIPE = Path(__file__).parents[3] / "distill" / "recipes" / "emoji_variety.yaml"
TABLE = {"fruit": ["red apple", "rocket"]}


@pytest.fixture
def overrides(tmp_path):
    (tmp_path / "prompts.txt").write_text("fruit\nred apple\nrocket\n")
    (tmp_path / "variants.json").write_text(json.dumps(TABLE))
    return [
        f"teacher={make_tiny_teacher(tmp_path / 'teacher')}", f"prompts={tmp_path / 'prompts.txt'}",
        "start=null", f"variety.variants={tmp_path / 'variants.json'}", "variety.steps=4",
        "variety.decay_steps=0", "variety.batch_size=4", "guard=null", "evaluate=null", "export.max_batch=2",
        "save_every=2",
    ]  # fmt: skip


def recipe_of(overrides, *more):
    return load_recipe(RECIPE, [*overrides, *more])


def test_places_are_even_and_those_of_the_noises_sum():
    noise = torch.randn(2000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    places = place_of(noise).numpy()
    sums = noise.double().sum((1, 2, 3)).numpy()
    np.testing.assert_allclose(places, norm.cdf(sums / np.sqrt(48)), atol=1e-5)
    assert kstest(places, "uniform").pvalue > 0.01


def test_a_noise_chooses_its_prompts_variants_in_equal_shares():
    rows = [[4], [0, 1, 2], [3, 1]]
    cond = Condition(torch.arange(5.0)[:, None, None], torch.arange(5.0)[:, None])
    variants = Variants(cond, rows)
    places = torch.linspace(0, 1, 601)
    for prompt, own in enumerate(rows):
        chosen = variants.chosen(torch.full((601,), prompt), places).pooled[:, 0].tolist()
        expected = [own[min(int(place * len(own)), len(own) - 1)] for place in places.double().tolist()]
        assert chosen == expected
        assert max(Counter(chosen).values()) - min(Counter(chosen).values()) <= 2


def test_a_new_code_changes_nothing(tmp_path):
    teacher = load_emoji_teacher(make_tiny_teacher(tmp_path))
    xt, t, cond = torch.randn(3, 64, 8, 8), torch.ones(3), teacher.encode(["red apple", "", "a b"])
    coded = teacher.new_denoiser(bf16=False)
    with_code(coded)
    with torch.no_grad():
        assert torch.equal(coded(xt, t, cond), teacher.denoiser(xt, t, cond))


def test_open_prompts_learn_the_variant_that_the_noise_stands_for_and_others_stay(overrides, tmp_path):
    recipe = recipe_of(
        overrides, "variety.steps=150", "variety.batch_size=16", "variety.rate=2e-3", "variety.code_rate=1e-2"
    )
    run = start_run(recipe, tmp_path / "run", resume=False)
    run.variety()
    before, noise = (
        run.teacher.denoiser,
        torch.randn(64, 64, 8, 8, generator=torch.Generator().manual_seed(5)),
    )
    after, t = run.student, torch.ones(64)

    def drawn(network, prompts):
        with torch.no_grad():
            return network.x0(noise, t, run.teacher.encode(prompts))

    named = [TABLE["fruit"][int(place * 2)] for place in place_of(noise).tolist()]
    other = [TABLE["fruit"][1 - int(place * 2)] for place in place_of(noise).tolist()]
    was, now = drawn(before, ["fruit"] * 64), drawn(after, ["fruit"] * 64)
    wanted, unwanted = drawn(before, named), drawn(before, other)
    error = (now - wanted).square().mean()
    assert error < 0.5 * (was - wanted).square().mean()
    assert error < 0.5 * (now - unwanted).square().mean()
    kept = (drawn(after, named) - wanted).square().mean()
    assert kept < 0.5 * (wanted - unwanted).square().mean()


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_its_bundle_holds_the_code_and_opens_as_the_student(overrides, tmp_path):
    run = start_run(recipe_of(overrides, "variety.code_rate=0.1"), tmp_path / "run", resume=False)
    parity = run.export()  # the graphs draw what torch draws
    assert {entry.component for entry in parity} == {"text_encoder", "denoiser", "decoder", "pictures"}
    bundle = open_bundle(run.bundle_folder, verify=True)
    assert any(name.startswith("noise_code/") for name in bundle.manifest.files)
    assert bundle.manifest.guidance.scale == 2.5
    opened, student = load_emoji_teacher(run.bundle_folder).denoiser, run.student
    assert isinstance(opened.code, NoiseCode)
    noise, cond = torch.randn(3, 64, 8, 8), run.teacher.encode(["fruit", "rocket", ""])
    with torch.no_grad():
        arrived, expected = opened.x0(noise, torch.ones(3), cond), student.x0(noise, torch.ones(3), cond)
        torch.testing.assert_close(
            arrived, expected, atol=1e-3, rtol=0
        )  # its positions are stored in float16
        student.code = None
        assert (student.x0(noise, torch.ones(3), cond) - expected).abs().max() > 0.02, (
            "the code says something"
        )


def test_a_run_that_was_killed_ends_bitwise_where_the_unbroken_one_does(overrides, tmp_path, monkeypatch):
    whole = start_run(recipe_of(overrides), tmp_path / "whole", resume=False)
    whole.variety()
    step = Variety.step

    def dies(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    broken = start_run(recipe_of(overrides), tmp_path / "broken", resume=False)
    with monkeypatch.context() as patched:
        patched.setattr(Variety, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            broken.variety()
    again = start_run(recipe_of(overrides), tmp_path / "broken", resume=True)
    again.variety()
    expected, arrived = (load_file(run.out / "variety" / "student.safetensors") for run in (whole, again))
    assert expected.keys() == arrived.keys()
    assert all(torch.equal(expected[name], arrived[name]) for name in expected)
    assert (whole.out / "variety" / trainer.METRICS).exists()


class Second(Ranks):
    """The second of two processes, whose gradients stay its own."""

    def average(self, gradients):
        """Leave them."""


def one_step(recipe, folder, ranks=ALONE):
    """Return what a step from the teacher logs, and the moved student's parameters."""
    teacher = load_emoji_teacher(folder)
    variants = Variants(teacher.encode(["red apple", "rocket"]), [[0, 1], [0], [1]])
    cond = teacher.encode(["fruit", "red apple", "rocket"])
    method = build("variety", Inputs(recipe, teacher, cond, cond, variants=variants, ranks=ranks))
    logs = method.step(3)
    rows = {half: method._loss(3, rows).item() for half, rows in (("all", range(4)), ("odd", range(1, 4, 2)))}
    return logs, rows, {name: p.detach().clone() for name, p in method.student.named_parameters()}


def test_a_batch_in_parts_and_a_processs_own_rows(overrides, tmp_path):
    whole, _, moved = one_step(recipe_of(overrides), tmp_path / "teacher")
    parted, _, parts = one_step(recipe_of(overrides, "memory.micro_batch=3"), tmp_path / "teacher")
    assert parted["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parted["student_norm"] == pytest.approx(whole["student_norm"], rel=1e-4)
    assert max((moved[name] - parts[name]).abs().max() for name in moved) < 1e-5, "a step moves by 2e-4"
    # A student of no rate stays where it was, so that its loss can be taken again.
    still = recipe_of(overrides, "variety.rate=1e-30", "variety.code_rate=1e-30")
    logs, rows, _ = one_step(still, tmp_path / "teacher", Second(1, 2))
    assert logs["loss"] == pytest.approx(rows["odd"])
    assert rows["odd"] != pytest.approx(rows["all"], rel=1e-3)


def test_both_rates_fall_to_zero_and_the_guard_looks(overrides, tmp_path, monkeypatch):
    seen, step = [], Variety.step

    def watched(self, number):
        seen.append([group["lr"] for group in self.optimizers["student"].param_groups])
        return step(self, number)

    monkeypatch.setattr(Variety, "step", watched)
    guard = "guard={every: 2, prompts: 1, seeds: 2}"
    recipe = recipe_of(
        overrides, "variety.decay_steps=2", "variety.rate=4e-4", "variety.code_rate=8e-3", guard
    )
    run = start_run(recipe, tmp_path / "run", resume=False)
    run.variety()
    np.testing.assert_allclose(seen, [[4e-4, 8e-3], [4e-4, 8e-3], [4e-4, 8e-3], [2e-4, 4e-3]])
    looks = json.loads((run.out / "variety" / "guard.json").read_text())["looks"]
    assert [look["step"] for look in looks] == [0, 2, 4]


@pytest.mark.parametrize("is_coded", [False, True])
def test_a_fake_score_is_pulled_towards_a_student_with_a_code(is_coded, tmp_path):
    """ADM's first step with `ida` ended in an error: the score has a code only where its teacher has."""
    folder = make_tiny_teacher(tmp_path)
    if is_coded:
        NoiseCode(384).save_pretrained(folder / "noise_code")
    teacher = load_emoji_teacher(folder)
    fake, student = (teacher.new_denoiser(bf16=False) for _ in range(2))
    with torch.no_grad():
        for weights in student.parameters():
            weights += 1
    with_code(student)
    pull(fake, student, 0.25)
    for ours, was in zip(fake.parameters(), teacher.denoiser.parameters(), strict=True):
        torch.testing.assert_close(ours, was + 0.25)


def test_a_teacher_with_a_code_wants_a_start_that_has_it_too(overrides, tmp_path):
    """It was found after the pairs, as weights of another network."""
    coded = shutil.copytree(tmp_path / "teacher", tmp_path / "coded")
    NoiseCode(384).save_pretrained(coded / "noise_code")
    plain = tmp_path / "teacher"
    for teacher, start, fits in ((coded, plain, False), (coded, coded, True), (plain, coded, True)):
        recipe = recipe_of(overrides, f"teacher={teacher}", f"start={start}")
        run = start_run(recipe, tmp_path / f"{teacher.name}-{start.name}", resume=False)
        with nullcontext() if fits else pytest.raises(RecipeError, match="a network of other parameters"):
            assert run.start is not None


def test_a_student_with_a_code_can_be_gone_on_from(overrides, tmp_path):
    """Its code is kept, as a start and as a teacher, whose run may be killed and go on."""
    coded, code = shutil.copytree(tmp_path / "teacher", tmp_path / "coded"), NoiseCode(384)
    torch.nn.init.normal_(code.last.weight)
    code.save_pretrained(coded / "noise_code")
    still = ("variety.code_rate=1e-30", "variety.rate=1e-30")
    from_start = start_run(recipe_of(overrides, *still, f"start={coded}"), tmp_path / "one", resume=False)
    recipe = recipe_of(overrides, *still, f"teacher={coded}")
    from_teacher = start_run(recipe, tmp_path / "two", resume=False)
    for run in (from_start, from_teacher):
        run.variety()
    record = tmp_path / "two" / "variety" / "stage.json"
    record.write_text(record.read_text().replace('"done": true', '"done": false'))
    start_run(recipe, tmp_path / "two", resume=True).variety()
    for run in (from_start, from_teacher):
        kept = load_file(run.out / "variety" / "student.safetensors")["code.last.weight"]
        torch.testing.assert_close(kept, code.last.weight.detach())


def test_other_variants_are_another_stage(overrides, tmp_path):
    start_run(recipe_of(overrides), tmp_path / "run", resume=False).variety()
    (tmp_path / "variants.json").write_text(json.dumps({"fruit": ["rocket"]}))
    with pytest.raises(RecipeError, match="other data"):
        start_run(recipe_of(overrides), tmp_path / "run", resume=True).variety()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"pear": ["rocket"]}', r"variety\.variants: expected training prompts, got 'pear'"),
        ('{"fruit": []}', r"variety\.variants: expected prompt -> its variants in .*, got List should have"),
        ("[1]", r"variety\.variants: expected prompt -> its variants"),
        (None, r"variety\.variants: expected a JSON file of prompts, found no"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(overrides, tmp_path, text, message):
    path = tmp_path / "variants.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        start_run(recipe_of(overrides), tmp_path / "run", resume=False).variety()


@pytest.mark.parametrize("change", ["time_steps=[1.0, 0.5]", "roles.student=lora", "family=sd3"])
def test_students_that_cannot_read_their_noise_are_refused(overrides, change):
    with pytest.raises(RecipeError, match=r"variety: expected family emoji, roles\.student full"):
        recipe_of(overrides, change, "shape={width: 64, height: 64}")


def test_its_memory_is_planned(overrides):
    plan = predict(recipe_of(overrides), "variety", for_cuda=False)
    assert plan.trainable["student"] > plan.parameters["teacher"], "the network and its code"
    assert plan.working_bytes is not None
    assert plan.working_bytes > 0


def test_weights_without_a_code_make_a_student_without_one(overrides, tmp_path):
    teacher = load_emoji_teacher(make_tiny_teacher(tmp_path / "other"))
    student = student_of(teacher, dict(teacher.denoiser.named_parameters()), recipe_of(overrides))
    assert student.code is None
