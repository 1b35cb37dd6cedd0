"""Regression on the pairs: it learns their endpoints, and ADP starts from its average."""

from pathlib import Path

import pytest
import torch

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.core.times import biased_times
from flashbulb_distill.pairs.store import Pairs
from flashbulb_distill.teachers.emoji import load_emoji_teacher
from flashbulb_distill.train.build import Inputs, build_adp, build_regression
from flashbulb_distill.train.recipe import RegressionRecipe, load_recipe
from support.tiny_teacher import make_tiny_teacher

RECIPE = Path(__file__).parents[3] / "distill" / "recipes" / "emoji.yaml"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_emoji_teacher(make_tiny_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def pairs():
    draws = Draws(0)
    return Pairs(
        torch.from_numpy(draws.normal("x_T", 0, range(6), (64, 8, 8))),
        torch.from_numpy(draws.normal("x_0", 0, range(6), (64, 8, 8))),
        torch.tensor([0, 1, 0, 1, 0, 1]),
        ("red apple", "a rocket"),
    )


def make(teacher, pairs, **settings):
    stage = RegressionRecipe(**{"steps": 60, "batch_size": 8, "rate": 1e-3} | settings)
    recipe = load_recipe(RECIPE, ["precision=float32"]).model_copy(update={"regression": stage})
    return build_regression(inputs(recipe, teacher, pairs))


def inputs(recipe, teacher, pairs, start=None):
    return Inputs(recipe, teacher, teacher.encode(pairs.prompts), teacher.encode_uncond(), pairs, start)


def test_the_logged_loss_is_the_velocity_error_of_the_drawn_pairs_computed_by_hand(teacher, pairs):
    method = make(teacher, pairs)
    start = {name: p.detach().clone() for name, p in method.student.named_parameters()}
    loss = method.step(3)["loss"]
    with torch.no_grad():
        for name, parameter in method.student.named_parameters():
            parameter.copy_(start[name])
    draws, rows = Draws(load_recipe(RECIPE).seed), range(8)
    total = 0.0
    for row in rows:
        pick = int(draws.integers("regression/pair", 3, [row], 6)[0])
        t = float(biased_times(draws.uniform("regression/time", 3, [row]))[0])
        x_0, x_T = pairs.x_0[pick], pairs.x_T[pick]
        cond = teacher.encode([pairs.prompts[int(pairs.prompt[pick])]])
        xt = ((1 - t) * x_0 + t * x_T)[None]
        with torch.no_grad():
            x0_hat = method.student(xt, torch.tensor([t]), cond)  # the family predicts x0
        total += float(((x0_hat[0] - x_0) ** 2).mean()) / max(t, 0.1) ** 2
    assert loss == pytest.approx(total / len(rows), rel=1e-4)


def test_it_learns_the_pairs_endpoints(teacher, pairs):
    method = make(teacher, pairs)
    losses = [method.step(step)["loss"] for step in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_adp_starts_from_the_given_weights(teacher, pairs):
    method = make(teacher, pairs)
    method.step(0)
    start = {name: p.detach() for name, p in method.student.named_parameters()}
    recipe = load_recipe(RECIPE, ["precision=float32", "adp.taps=[-1,0,1]"])
    adp = build_adp(inputs(recipe, teacher, pairs, start))
    assert all(torch.equal(p, start[name]) for name, p in adp.student.named_parameters())


def test_the_rate_falls_evenly_to_zero_in_the_last_steps():
    falling = RegressionRecipe(steps=10, decay_steps=4, batch_size=8, rate=1e-3)
    assert [falling.rate_at(step) for step in range(10)] == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert {RegressionRecipe(steps=10, batch_size=8, rate=1e-3).rate_at(step) for step in range(10)} == {1.0}
    short = RegressionRecipe(steps=2, decay_steps=4000, batch_size=8, rate=1e-3)
    assert [short.rate_at(step) for step in range(2)] == [1, 0.5]
