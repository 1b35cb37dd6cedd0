"""Training may begin with the first pairs: what a step draws is written down, and one process writes the store."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.pairs.generate import generate_pairs
from flashbulb_distill.pairs.growing import JOURNAL, GrowingPairs
from flashbulb_distill.pairs.lock import is_written, only_writer
from flashbulb_distill.pairs.store import read_pairs
from flashbulb_distill.run import start_run
from flashbulb_distill.teachers.mixture import MixtureDenoiser, ring
from flashbulb_distill.train.recipe import RecipeError, load_recipe
from flashbulb_distill.train.trainer import train
from support.mixture_methods import NO_PROMPT, SHAPE, make_method
from support.tiny_teacher import make_tiny_teacher

RECIPE = Path(__file__).parents[3] / "distill" / "recipes" / "emoji.yaml"
TOTAL = 30


def fill(folder, count):
    """Make pairs until there are `count`, ten a shard."""
    generate_pairs(
        folder, MixtureDenoiser(ring(4), 0.2), ("",), NO_PROMPT, NO_PROMPT, latent_shape=SHAPE,
        count=count, num_steps=3, guidance=1.0, draws=Draws(0), batch_size=10,
    )  # fmt: skip


def growing(folder, **options):
    return GrowingPairs(folder / "pairs", folder / JOURNAL, TOTAL, every=2, **options)


def test_a_step_finds_as_many_pairs_as_it_found_the_first_time(tmp_path):
    fill(tmp_path / "pairs", 10)
    pairs = growing(tmp_path)
    assert (pairs.known(0), pairs.known(1)) == (10, 10)
    fill(tmp_path / "pairs", 20)
    assert [pairs.known(step) for step in (1, 2, 3)] == [10, 20, 20]
    assert pairs.known(1) == 10, "a run that went back"
    assert torch.equal(pairs.x_0, read_pairs(tmp_path / "pairs").x_0)
    fill(tmp_path / "pairs", TOTAL)
    again = growing(tmp_path)
    assert [again.known(step) for step in (0, 1, 2, 3)] == [10, 10, 20, 20]
    assert [again.known(step) for step in (4, 5, 99)] == [TOTAL] * 3
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert lines == [{"step": 0, "pairs": 10}, {"step": 2, "pairs": 20}, {"step": 4, "pairs": TOTAL}]


def test_a_line_that_was_torn_was_of_no_step_yet(tmp_path):
    fill(tmp_path / "pairs", 10)
    growing(tmp_path)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"step": 2, "pa')
    assert growing(tmp_path).known(1) == 10
    assert (tmp_path / JOURNAL).read_text() == '{"step": 0, "pairs": 10}\n'


def learn(folder, steps, on_step=lambda step: None):
    """Regress on the growing pairs; `on_step` is called before each step."""
    method = make_method("regression", optimizer=torch.optim.AdamW, rate=1e-3)
    method = dataclasses.replace(method, pairs=growing(folder))
    step_of = type(method).step

    class Watched(type(method)):
        def step(self, step):
            on_step(step)
            return step_of(self, step)

    watched = Watched(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})
    return train(
        watched,
        folder / "run",
        stage="regression",
        steps=steps,
        ema=0.9,
        identity="a",
        save_every=5,
        log_every=1,
    )


def grow_at_four(folder):
    return lambda step: fill(folder / "pairs", 20) if step == 4 else None


class Killed(Exception):
    """The process is gone."""


def broken_off(folder):
    """Run as `grow_at_four`, but end before step 7; the newest checkpoint is of step 5, and more pairs come then."""

    def on_step(step):
        grow_at_four(folder)(step)
        if step == 7:
            raise Killed

    fill(folder / "pairs", 10)
    with pytest.raises(Killed):
        learn(folder, 8, on_step)
    fill(folder / "pairs", TOTAL)


def test_a_broken_run_ends_bitwise_where_the_unbroken_one_does_though_pairs_came_in_between(tmp_path):
    whole, parts, forgetful = (tmp_path / name for name in ("whole", "parts", "forgetful"))
    fill(whole / "pairs", 10)
    expected = learn(whole, 8, grow_at_four(whole))
    broken_off(parts)
    found = learn(parts, 8)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # The planted fault: without its journal the run draws from pairs that were not there.
    broken_off(forgetful)
    (forgetful / JOURNAL).unlink()
    other = learn(forgetful, 8)
    assert not all(torch.equal(expected[name], other[name]) for name in expected)


def test_only_one_process_writes_a_store_and_another_waits(tmp_path):
    waits, order = threading.Event(), []

    def other():
        with only_writer(tmp_path, waits.set):
            order.append("second")

    assert not is_written(tmp_path)
    with only_writer(tmp_path):
        assert is_written(tmp_path)
        thread = threading.Thread(target=other)
        thread.start()
        assert waits.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert not is_written(tmp_path)


def test_a_start_after_more_than_all_pairs_is_refused():
    with pytest.raises(RecipeError, match="start_after: expected at most the count, 8, got 9"):
        load_recipe(RECIPE, ["pairs.count=8", "pairs.start_after=9"])


class Interrupted(Exception):
    """The process that makes pairs ended early."""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_training_begins_with_the_first_shards_while_another_process_makes_the_others(tmp_path):
    teacher = make_tiny_teacher(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("red apple\nrocket\n")
    recipe = load_recipe(
        RECIPE,
        [
            f"teacher={teacher}", f"prompts={tmp_path / 'prompts.txt'}", "precision=float32", "evaluate=null",
            "pairs.count=8", "pairs.num_steps=2", "pairs.batch_size=4", "pairs.start_after=4",
            "regression.steps=2", "regression.batch_size=4", "guard=null", "adp=null", "adm=null",
        ],
    )  # fmt: skip
    run = start_run(recipe, tmp_path / "run", resume=False)

    def stop(stage, done, total, logs=None):
        raise Interrupted

    with pytest.raises(Interrupted):
        dataclasses.replace(run, progress=stop).pairs()
    with only_writer(run.out / "pairs"):  # the other process, at work on the second shard
        run.regression()
    assert (run.out / "regression" / JOURNAL).read_text() == '{"step": 0, "pairs": 4}\n'
    assert len(read_pairs(run.out / "pairs")) == 4
    run.pairs()
    assert len(read_pairs(run.out / "pairs")) == 8
    # Where nobody makes pairs, the run makes all of them first.
    alone = start_run(recipe, tmp_path / "alone", resume=False)
    alone.regression()
    assert (alone.out / "regression" / JOURNAL).read_text() == '{"step": 0, "pairs": 8}\n'
