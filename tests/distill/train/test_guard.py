"""The health guard: what it decides is a pure function, and what it does to a run is exact."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.core.schedule import add_noise
from flashbulb_distill.networks.discriminators import VectorDiscriminator
from flashbulb_distill.networks.point import PointDenoiser
from flashbulb_distill.pairs.generate import sample_teacher
from flashbulb_distill.teachers.denoiser import Condition
from flashbulb_distill.teachers.mixture import MixtureDenoiser, ring
from flashbulb_distill.train import trainer
from flashbulb_distill.train.adm import Adm
from flashbulb_distill.train.checkpoint import checkpoints, save_checkpoint
from flashbulb_distill.train.guard import (
    Band,
    Collapsed,
    Guard,
    GuardState,
    broken,
    decide,
    faults_of,
    figures_of,
    load_bands,
    note,
)
from flashbulb_distill.train.probe import Probe, compare_samples, evenly
from flashbulb_distill.train.recipe import AdmRecipe, GuardRecipe, Rates, RecipeError
from flashbulb_distill.train.trainer import train

BANDS = (Band(figure="x", low=0.5, high=2, meaning="x is off", origin="test"),)
RECIPE = GuardRecipe(every=10, patience=2, reductions=1, rollbacks=1)
NO_PROMPT = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))


def looks(values, state=None):
    """Give the guard one value of x a look, ten steps apart, and return its actions and state."""
    state, actions = state or GuardState(), []
    for index, value in enumerate(values):
        action, state = decide(state, 10 * (index + 1), {"x": value}, BANDS, RECIPE)
        actions.append(action)
    return actions, state


def test_it_reduces_then_rolls_back_then_stops_and_says_why():
    actions, state = looks([1, 1, 9, 9, 9, 9])
    assert actions == ["go on", "go on", "go on", "reduce", "go on", "roll back"]
    assert (state.rate, state.good_step, state.events[-1].to_step) == (0.25, 20, 20)
    assert state.events[0].reason == "x 9, expected 0.5 to 2: x is off, for 2 looks in a row"
    assert [look.step for look in state.looks] == [10, 20], "it has forgotten what it took back"
    again, state = looks([9, 9], state)
    assert again == ["go on", "stop"]


def test_one_bad_look_between_good_ones_is_no_violation():
    actions, state = looks([1, 9, 1, 9, 1, 9])
    assert set(actions) == {"go on"}
    assert state.good_step == 50


def test_a_scalar_that_is_no_number_goes_back_at_once_and_the_second_time_stops():
    _, state = looks([1, 1])
    action, state = broken(state, 27, "loss is nan", RECIPE)
    assert (action, state.events[-1].to_step, state.rate) == ("roll back", 20, 0.5)
    assert broken(state, 29, "loss is nan", RECIPE)[0] == "stop"


def test_figures_are_means_since_the_last_look_and_growth_over_earlier_ones():
    state = GuardState()
    for value in (1.0, 3.0):
        state = note(state, {"student_norm": value, "fake_loss": value})
    assert figures_of(state, {"contrast": 0.9}) == {"student_norm": 2.0, "fake_loss": 2.0, "contrast": 0.9}
    for step in (1, 2, 3):
        _, state = decide(state, step, figures_of(state, {}), (), RECIPE)
        state = note(state, {"student_norm": 2.0, "fake_loss": 2.0})
    _, state = decide(state, 4, {}, (), RECIPE)
    grown = figures_of(note(state, {"student_norm": 30.0, "fake_loss": 8.0}), {})
    assert (grown["norm_growth/student_norm"], grown["fake_lag"]) == (15.0, 4.0)


def test_a_student_that_comes_down_from_noise_to_its_teacher_loses_nothing():
    """The start is never judged: 1.6 of the teacher's contrast was to be kept, and the teacher's own was a fault."""
    guard = Guard(RECIPE, load_bands(None, "adp"), lambda step, student: {"contrast": 1.6, "diversity": 1.6})
    state = guard.begin(torch.nn.Identity())
    figures = figures_of(state, {"contrast": 1.0, "diversity": 1.0})
    assert (figures["contrast_kept"], figures["diversity_kept"]) == (1.0, 1.0)
    for step in range(1, 9):
        action, state = decide(state, step, figures_of(state, {"contrast": 1.0}), guard.bands, RECIPE)
        assert action == "go on"
    fallen = figures_of(state, {"contrast": 0.6})
    assert fallen["contrast_kept"] == 0.6, "what it loses of its teacher's still shows"


def test_a_figure_that_is_no_number_is_out_of_every_band():
    assert faults_of({"x": math.nan}, BANDS) == ("x nan, expected 0.5 to 2: x is off",)
    assert faults_of({"y": math.nan}, BANDS) == (), "it has no band"
    assert faults_of(
        {"norm_growth/fake": 9.0}, [Band(figure="norm_growth/*", high=5, meaning="m", origin="o")]
    )


def test_the_built_in_bands_say_where_they_come_from():
    for stage in ("regression", "adp", "adm"):
        bands = load_bands(None, stage)
        assert bands
        assert all(band.meaning and band.origin for band in bands)


def test_the_documented_bands_are_the_built_in_ones():
    text = (Path(__file__).parents[3] / "docs/distilling.md").read_text(encoding="utf-8")
    for band in load_bands(None, "adm"):
        row = next(line for line in text.splitlines() if line.startswith("|") and f"`{band.figure}`" in line)
        limits = [f"at most {band.high:g}"] if band.high is not None else []
        limits += [f"at least {band.low:g}"] if band.low is not None else []
        assert all(limit in row for limit in limits), band.figure


def test_bands_of_another_form_are_refused(tmp_path):
    path = tmp_path / "bands.json"
    path.write_text('{"adm": [{"figure": "x", "hihg": 3}]}')
    with pytest.raises(RecipeError, match=r"guard\.bands: expected lists of bands by stage"):
        load_bands(path, "adm")
    with pytest.raises(RecipeError, match="found no"):
        load_bands(tmp_path / "none.json", "adm")


def test_samples_are_compared_by_colour_contrast_and_diversity():
    torch.manual_seed(0)
    teacher = torch.randn(3, 5, 3, 8, 8) * 0.3 + torch.randn(3, 5, 1, 1, 1) * 0.3
    same = compare_samples(teacher, teacher)
    assert same == {"colour_drift": 0.0, "contrast": 1.0, "diversity": 1.0}
    grey = compare_samples(teacher * 0.5, teacher)
    assert grey["contrast"] == pytest.approx(0.5, abs=1e-5)
    one_mode = compare_samples(teacher[:, :1].expand(-1, 5, -1, -1, -1), teacher)
    assert one_mode["diversity"] == 0.0
    assert one_mode["contrast"] > 0.8, "collapse to one sample a prompt is not seen in contrast"
    tinted = teacher + torch.tensor([0.5, 0.0, 0.0])[:, None, None]
    assert compare_samples(tinted, teacher)["colour_drift"] > 0.5


@pytest.fixture(scope="module")
def prepared():
    """Student and fake score that regression on the mixture's own ODE has prepared: a start as ADM has it."""
    torch.manual_seed(0)
    teacher, draws = MixtureDenoiser(ring(4), 0.2), Draws(1)
    student, fake = PointDenoiser(2), PointDenoiser(2)
    noise = torch.from_numpy(draws.normal("noise", 0, range(1024), (2, 1, 1)))
    clean = sample_teacher(teacher, noise, NO_PROMPT, NO_PROMPT, num_steps=20, guidance=1.0)
    optimizer = torch.optim.AdamW([*student.parameters(), *fake.parameters()], lr=2e-3)
    for step in range(400):
        rows = torch.from_numpy(draws.integers("rows", step, range(128), len(clean)))
        t = torch.from_numpy(draws.uniform("t", step, range(128))).float().clamp(min=0.05)
        eps = torch.from_numpy(draws.normal("eps", step, range(128), (2, 1, 1)))
        xt = add_noise("rectified-flow", clean[rows], eps, t[:, None, None, None])
        one_step = student.x0(noise[rows], torch.ones(128), NO_PROMPT.expand(128))
        loss = (one_step - clean[rows]).square().mean()
        loss = loss + (fake.x0(xt, t, NO_PROMPT.expand(128)) - clean[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.state_dict(), fake.state_dict()


def test_prompts_are_taken_evenly_and_each_once():
    prompts = ["a", "a", "b", "c", "b", "d", "e", "f"]
    assert [prompts[place] for place in evenly(prompts, 3)] == ["a", "c", "e"]
    assert evenly(prompts, 99) == [0, 2, 3, 5, 6, 7]


def adm(prepared, student_rate=1e-4, steps=60):
    """ADM on the mixture of Gaussians, small enough for a test."""
    torch.manual_seed(0)
    networks = {"student": PointDenoiser(2), "fake": PointDenoiser(2), "latent": VectorDiscriminator(2)}
    for network, values in zip(("student", "fake"), prepared, strict=True):
        networks[network].load_state_dict(values)
    rates = {"student": student_rate, "fake": 5e-4, "latent": 1e-3}
    return Adm(
        recipe=AdmRecipe(
            steps=steps,
            batch_size=64,
            rates=Rates(student=student_rate, heads=1e-3, fake=5e-4),
            taps=(-1,),
            guidance=1.0,
            delta_t=1 / 4,
            time_range=(0.1, 0.9),
            warmup_steps=10,
        ),
        draws=Draws(0),
        cond=NO_PROMPT,
        uncond=NO_PROMPT,
        latent_shape=(2, 1, 1),
        time_steps=(1.0,),
        teacher=MixtureDenoiser(ring(4), 0.2),
        optimizers={
            role: torch.optim.AdamW(network.parameters(), lr=rates[role], betas=(0.0, 0.99))
            for role, network in networks.items()
        },
        **networks,
    )


def guard(stage="adm", **options):
    teacher = MixtureDenoiser(ring(4), 0.2)
    probe = Probe(teacher, NO_PROMPT, NO_PROMPT, (2, 1, 1), (1.0,), 1.0, Draws(0), seeds=64)
    recipe = GuardRecipe(**({"every": 5, "patience": 1} | options))
    return Guard(recipe, load_bands(None, stage), probe)


def run(folder, method, watch, steps=60, **options):
    settings = {"stage": "adm", "steps": steps, "ema": 0.9, "identity": "a", "log_every": 5, "save_every": 10}
    return train(method, folder, guard=watch, **(settings | options))


def test_a_forced_collapse_is_caught_rolled_back_and_stopped(tmp_path, prepared):
    """The student's rate times a thousand: its samples fall into one point or fly away."""
    with pytest.raises(Collapsed, match=r"stopped by the guard: .*expected"):
        run(tmp_path, adm(prepared, 0.1), guard())
    record = json.loads((tmp_path / "guard.json").read_text())
    assert [event["action"] for event in record["events"]] == ["reduce", "roll back", "stop"]
    assert record["rate"] == 0.25


def test_a_healthy_run_is_left_alone(tmp_path, prepared):
    watch = guard(patience=2)
    run(tmp_path, adm(prepared), watch)
    assert watch.state.events == ()
    assert [look.step for look in watch.state.looks] == [*range(0, 61, 5)]


def test_a_look_and_a_save_at_the_same_step_write_one_checkpoint(tmp_path, prepared, monkeypatch):
    written = []

    def save(folder, step, *args, **options):
        written.append(step)
        return save_checkpoint(folder, step, *args, **options)

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    run(tmp_path, adm(prepared), guard(every=10, patience=9), steps=30)
    assert written == [0, 10, 20, 30]


class Spoilt:
    """A method whose scalar is no number at one step, once the rates are the recipe's own."""

    def __init__(self, method, at):
        self.method, self.at = method, at
        self.modules, self.optimizers = method.modules, method.optimizers

    def step(self, step):
        logs = self.method.step(step)
        full = self.optimizers["student"].param_groups[0]["lr"] == 1e-4
        return logs | ({"student_loss": math.nan} if step == self.at and full else {})


def bitwise(a, b):
    first, second = (load_file(checkpoints(folder)[0]) for folder in (a, b))
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_after_a_roll_back_the_run_is_the_one_from_there_with_the_lower_rates(tmp_path, prepared):
    wide = {"bands": None, "patience": 99}
    run(tmp_path / "spoilt", Spoilt(adm(prepared, steps=30), 17), guard(**wide), steps=30)
    lowered = adm(prepared, steps=30)
    run(tmp_path / "by-hand", lowered, guard(**wide), steps=15)
    for optimizer in lowered.optimizers.values():
        optimizer.param_groups[0]["lr"] *= 0.5
    for step in range(15, 30):
        lowered.step(step)
    mended = load_file(checkpoints(tmp_path / "spoilt")[0])
    for name, value in lowered.student.state_dict().items():
        assert torch.equal(mended[f"module/student/{name}"], value)
    lines = [json.loads(line) for line in (tmp_path / "spoilt" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize("killed_at", [8, 16, 22])
def test_a_guarded_run_that_was_killed_ends_bitwise_where_the_unbroken_one_does(
    tmp_path, prepared, killed_at
):
    """Before, between and after the roll back from step 17 to 15."""

    class Killed(Spoilt):
        steps_done = 0

        def step(self, step):
            self.steps_done += 1
            if self.steps_done == killed_at:
                raise KeyboardInterrupt
            return super().step(step)

    wide = {"patience": 99}
    run(tmp_path / "whole", Spoilt(adm(prepared, steps=30), 17), guard(**wide), steps=30)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Killed(adm(prepared, steps=30), 17), guard(**wide), steps=30)
    watch = guard(**wide)
    run(tmp_path / "parts", Spoilt(adm(prepared, steps=30), 17), watch, steps=30)
    assert bitwise(tmp_path / "whole", tmp_path / "parts")
    assert [(event.action, event.step, event.to_step) for event in watch.state.events] == [
        ("roll back", 17, 15)
    ]
    whole, parts = (json.loads((tmp_path / name / "guard.json").read_text()) for name in ("whole", "parts"))
    assert whole == parts


def test_without_a_guard_a_scalar_that_is_no_number_still_stops_the_run(tmp_path, prepared):
    with pytest.raises(FloatingPointError, match="student_loss is nan; lower the learning rates"):
        run(tmp_path, Spoilt(adm(prepared, steps=30), 17), None, steps=30)
