"""The loop: exact resume, averages, refusals."""

import json
import logging
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.train.checkpoint import State, checkpoints, load_checkpoint
from flashbulb_distill.train.trainer import Stopped, train


class Regression:
    """A method small enough to follow by hand: fit one matrix to drawn targets."""

    def __init__(self, stop_at=None, fault_at=None):
        torch.manual_seed(0)
        self.modules = {"student": torch.nn.Linear(3, 2)}
        self.optimizers = {"student": torch.optim.AdamW(self.modules["student"].parameters(), lr=1e-2)}
        self.stop_at, self.fault_at = stop_at, fault_at

    def step(self, step):
        if step == self.stop_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(Draws(0).normal("x", step, range(4), (3,)))
        loss = (self.modules["student"](x) - x[:, :2]).square().mean()
        self.optimizers["student"].zero_grad()
        loss.backward()
        self.optimizers["student"].step()
        return {"loss": float("nan") if step == self.fault_at else loss.item()}


def run(method, folder, **options):
    settings = {"stage": "test", "steps": 20, "ema": 0.9, "identity": "a", "log_every": 5} | options
    return train(method, folder, **settings)


def test_an_interrupted_run_ends_bitwise_where_the_unbroken_one_does(tmp_path):
    whole = run(Regression(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Regression(stop_at=13), tmp_path / "parts")
    parts = run(Regression(), tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    a, b = (load_file(checkpoints(tmp_path / name)[0]) for name in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), "weights, optimiser states and averages"


def test_a_falling_rate_is_the_one_set_by_hand_in_every_step_and_after_an_interruption(tmp_path):
    def falls(step):
        return min(1.0, (20 - step) / 10)

    by_hand = Regression()
    for step in range(20):
        by_hand.optimizers["student"].param_groups[0]["lr"] = 1e-2 * falls(step)
        by_hand.step(step)
    run(Regression(), tmp_path / "whole", rate_at=falls)
    with pytest.raises(KeyboardInterrupt):
        run(Regression(stop_at=17), tmp_path / "parts", rate_at=falls, save_every=16)
    run(Regression(), tmp_path / "parts", rate_at=falls)
    expected = by_hand.modules["student"].weight
    for folder in ("whole", "parts"):
        got = load_file(checkpoints(tmp_path / folder)[0])["module/student/weight"]
        assert torch.equal(got, expected), folder


def test_the_average_is_the_one_computed_by_hand(tmp_path):
    averages = run(Regression(), tmp_path, steps=3, average_from=1)
    twin, by_hand = Regression(), None
    for step in range(3):
        twin.step(step)
        weight = twin.modules["student"].weight.detach().clone()
        decay = 0.0 if step < 1 else min(0.9, step / (9 + step))
        by_hand = weight if by_hand is None else by_hand * decay + weight * (1 - decay)
    torch.testing.assert_close(averages["weight"], by_hand)


def test_metrics_are_logged_as_means_a_line_each(tmp_path):
    run(Regression(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_checkpoint_of_another_run_and_a_damaged_one_are_refused(tmp_path):
    run(Regression(), tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        run(Regression(), tmp_path, identity="b")
    for path in checkpoints(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    method = Regression()
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(tmp_path, State(method.modules, method.optimizers, {}), "a")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="step 7"):
        run(Regression(fault_at=7), tmp_path)


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, caplog):
    whole = run(Regression(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Regression(stop_at=17), tmp_path / "parts", save_every=5)
    newest, before = checkpoints(tmp_path / "parts")
    assert ("00000015" in newest.name, "00000010" in before.name) == (True, True)
    newest.write_bytes(newest.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        parts = run(Regression(), tmp_path / "parts", save_every=5)
    assert "is damaged: going on from the checkpoint before it" in caplog.text
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


class Shared(torch.optim.SGD):
    """An optimiser that remembers as bitsandbytes does: steps as a plain number, one table for all parameters."""

    table = torch.linspace(-1, 1, 256)

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                state["table"] = state.get("table", self.table)
                parameter.grad *= state["table"][-state["step"]]
        super().step(closure)


def with_shared_state(**options):
    method = Regression(**options)
    method.optimizers = {"student": Shared(method.modules["student"].parameters(), lr=1e-2)}
    return method


def test_an_optimiser_with_plain_numbers_and_a_shared_table_goes_on_bitwise(tmp_path):
    whole = run(with_shared_state(), tmp_path / "whole", save_every=5)
    with pytest.raises(KeyboardInterrupt):
        run(with_shared_state(stop_at=13), tmp_path / "parts", save_every=5)
    parts = run(with_shared_state(), tmp_path / "parts", save_every=5)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_states_of_another_optimiser_are_refused(tmp_path):
    run(with_shared_state(), tmp_path, steps=5)
    with pytest.raises(
        ValueError, match=r"expected the optimisers .*AdamW.*, found states of .*Shared.*; set mem"
    ):
        run(Regression(), tmp_path, steps=6)


def test_logged_scalars_are_those_of_the_unbroken_run(tmp_path):
    def scalars(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]

    run(Regression(), tmp_path / "whole", save_every=7)
    with pytest.raises(KeyboardInterrupt):
        run(Regression(stop_at=16), tmp_path / "parts", save_every=7)  # logged at 15, saved at 14
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "torn')
    run(Regression(), tmp_path / "parts", save_every=7)
    assert scalars(tmp_path / "parts") == scalars(tmp_path / "whole")


class Signalled(Regression):
    """The same, but a signal arrives in the middle of a step."""

    def step(self, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(step)


def test_a_signal_ends_the_run_between_two_steps_with_a_checkpoint(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM; go on with --resume"):
        run(Signalled(), tmp_path / "parts")
    assert signal.getsignal(signal.SIGTERM) == before
    assert "00000007" in checkpoints(tmp_path / "parts")[0].name
    whole, parts = run(Regression(), tmp_path / "whole"), run(Regression(), tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
