"""The training loop. It knows steps, averages, logs and checkpoints, and nothing of any method.

Killed at any moment and started again, it ends bit for bit where it would have ended: every draw has a key, a
checkpoint holds all that a step changes, and lines that were logged after it are cut off.
"""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..ranks import ALONE, Ranks
from ..sharding import own, whole
from .checkpoint import State, drop_checkpoints, load_checkpoint, save_checkpoint
from .guard import Action, Collapsed, Guard, GuardState, broken, note
from .recipe import SAVE_EVERY

METRICS = "metrics.jsonl"

log = logging.getLogger(__name__)
Report = Callable[[str, int, int, dict[str, float]], None]


class Method(Protocol):
    """A distillation method: its trained networks and one step of updates."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role; "student" is among them."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """One optimiser for each role."""
        ...

    def step(self, step: int) -> dict[str, float]:
        """Do the updates of one step, number `step`, and return scalars to log."""
        ...


class Stopped(Exception):
    """The run was asked to end by a signal, and did so between two steps, with a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with --resume")
        self.number = number


def quiet(stage: str, step: int, steps: int, logs: dict[str, float]) -> None:
    """Report nothing."""


def train(
    method: Method,
    folder: Path,
    *,
    stage: str,
    steps: int,
    ema: float,
    identity: str,
    average_from: int = 0,
    rate_at: Callable[[int], float] = lambda step: 1.0,
    save_every: int = SAVE_EVERY,
    log_every: int = 10,
    report: Report = quiet,
    ranks: Ranks = ALONE,
    guard: Guard | None = None,
) -> dict[str, Tensor]:
    """Run a method to its last step, going on from the folder's checkpoint, and return the averaged student.

    Args:
        average_from: the step from which the student moves; the average starts there.
        rate_at: step, from 0 -> what the learning rates are multiplied by.
        identity: hash of recipe and inputs; a checkpoint of another one is refused.
        report: called with (stage, step, steps, means of the logs since the last call).
        ranks: the processes that train together; the first one writes.
        guard: looks at the run's health, and may lower the rates or take steps back.
    Returns:
        The exponential moving average of the student's parameters, whole, by name.
    Raises:
        FloatingPointError: a logged scalar is not finite, and there is no guard.
        Collapsed: the guard stopped the run.
        ValueError: the checkpoints are damaged or belong to another run.
        Stopped: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    student = method.modules["student"]
    parameters = dict(student.named_parameters())
    averages = {name: p.detach().clone() for name, p in parameters.items()}
    device = next(iter(averages.values())).device
    state = State(method.modules, method.optimizers, averages)
    rates = _rates(method.optimizers)
    sums, step, saved = state.sums, 0, -1

    def load(at: int | None = None) -> int:
        step = load_checkpoint(folder, state, identity, at=at)
        if ranks.is_first:
            _cut(folder / METRICS, step)
        else:
            sums.clear()  # a checkpoint has those of all processes, and the first one keeps them
        return step

    def save() -> Path | None:
        nonlocal saved
        saved = step
        if guard is not None:
            state.notes["guard"] = guard.state.model_dump()
        for name, values in _joined(ranks.gather(sums)).items():
            sums[name] = values
        keep = None if guard is None else guard.state.good_step
        path = save_checkpoint(folder, step, state, identity, keep=keep, ranks=ranks)
        if not ranks.is_first:
            sums.clear()
        return path

    def act(guard: Guard, action: Action, after: GuardState) -> None:
        """Do what the guard decided; `step` is then the one to go on from."""
        nonlocal step
        guard.state = after
        if action != "go on":
            log.warning("%s step %d: guard: %s: %s", stage, step, action, after.events[-1].reason)
        if ranks.is_first:
            guard.write(folder)
        if action == "stop":
            raise Collapsed(f"{stage} step {step}: stopped by the guard: {after.events[-1].reason}")
        if action == "roll back":
            step = load(after.good_step)
        if action == "roll back" or after.good_step == step:
            path = save()
            if action == "roll back" and path is not None:
                drop_checkpoints(folder, except_for=path)

    step = load()
    if guard is not None:
        guard.state = GuardState.model_validate(state.notes.get("guard", {}))
        if step == 0:
            # All ranks draw the probe's samples; the first one's word counts, should their arithmetic differ.
            guard.state = ranks.agree(guard.begin(student))
            save()  # a place to go back to
    started = time.monotonic()
    with _signals() as came:
        while step < steps:
            _set_rates(method.optimizers, rates, rate_at(step) * (guard.state.rate if guard else 1.0))
            logs = method.step(step)
            if fault := _fault(logs, ranks, device):
                if guard is None:
                    raise FloatingPointError(f"{stage} step {step}: {fault}; lower the learning rates")
                act(guard, *broken(guard.state, step, fault, guard.recipe))
                continue
            for name, value in logs.items():
                sums.setdefault(name, []).append(value)
            # A short memory first, so that the average forgets where the student started.
            moved = step - average_from
            decay = min(ema, (1 + moved) / (10 + moved)) if moved >= 0 else 0.0
            for name, parameter in parameters.items():
                own(averages[name]).lerp_(own(parameter), 1 - decay)
            step += 1
            if step % log_every == 0 or step == steps:
                means = {n: sum(v) / len(v) for n, v in _joined(ranks.gather(sums)).items()}
                sums.clear()
                if guard is not None:
                    guard.state = note(guard.state, means)
                if ranks.is_first:
                    seconds = time.monotonic() - started
                    _append(folder / METRICS, {"stage": stage, "step": step, "seconds": seconds, **means})
                    report(stage, step, steps, means)
            if guard is not None and step % guard.recipe.every == 0:
                act(guard, *ranks.agree(guard.look(step, student)))
            stop = ranks.any(bool(came), device)
            if (stop or step == steps or step % save_every == 0) and saved != step:
                save()
            if stop and step < steps:
                raise Stopped(came[0] if came else signal.SIGTERM)
    return {name: whole(value) for name, value in averages.items()}


def _fault(logs: Mapping[str, float], ranks: Ranks, device: torch.device) -> str:
    """Say which scalar of which process is no number; "" where all are. All processes get the same answer."""
    fault = next((f"{name} is {value}" for name, value in logs.items() if not math.isfinite(value)), "")
    if not ranks.any(bool(fault), device):
        return ""
    faults = ranks.gather(fault)
    where = next(index for index, found in enumerate(faults) if found)
    return faults[where] + (f" in process {where} of {ranks.count}" if ranks.count > 1 else "")


def _rates(optimizers: Mapping[str, Optimizer]) -> list[float]:
    return [group["lr"] for optimizer in optimizers.values() for group in optimizer.param_groups]


def _set_rates(optimizers: Mapping[str, Optimizer], rates: Sequence[float], factor: float) -> None:
    """Set every group's learning rate to its own in the recipe times the factor."""
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate * factor


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM instead of breaking off a step; a second one acts as always."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _joined(parts: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Put the values of all processes together, by name."""
    joined: dict[str, list[float]] = {}
    for part in parts:
        for name, values in part.items():
            joined.setdefault(name, []).extend(values)
    return joined


def _append(path: Path, record: Mapping[str, object]) -> None:
    with path.open("a") as handle:
        handle.write(json.dumps(record) + "\n")


def _cut(path: Path, step: int) -> None:
    """Drop lines that were logged after a checkpoint's step, and one that was torn."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
