"""The training loop. It knows steps, averages, logs and checkpoints, and nothing of any method.

Killed at any moment and started again, it ends bit for bit where it would have ended: every draw has a key, a
checkpoint holds all that a step changes, and lines that were logged after it are cut off.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..ranks import ALONE, Ranks
from .checkpoint import State, load_checkpoint, save_checkpoint

METRICS = "metrics.jsonl"
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
    save_every: int = 100,
    log_every: int = 10,
    report: Report = quiet,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Run a method to its last step, going on from the folder's checkpoint, and return the averaged student.

    Args:
        average_from: the step from which the student moves; the average starts there.
        identity: hash of recipe and inputs; a checkpoint of another one is refused.
        report: called with (stage, step, steps, means of the logs since the last call).
        ranks: the processes that train together; the first one writes.
    Returns:
        The exponential moving average of the student's parameters, by name.
    Raises:
        FloatingPointError: a logged scalar is not finite.
        ValueError: the checkpoints are damaged or belong to another run.
        Stopped: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    student = method.modules["student"]
    averages = {name: p.detach().clone() for name, p in student.named_parameters()}
    device = next(iter(averages.values())).device
    state = State(method.modules, method.optimizers, averages)
    step = load_checkpoint(folder, state, identity)
    sums = state.sums
    if ranks.is_first:
        _cut(folder / METRICS, step)
    else:
        sums.clear()  # a checkpoint has those of all processes, and the first one keeps them
    started = time.monotonic()

    def save() -> None:
        for name, values in _joined(ranks.gather(sums)).items():
            sums[name] = values
        if ranks.is_first:
            save_checkpoint(folder, step, state, identity)
        else:
            sums.clear()

    with _signals() as came:
        while step < steps:
            for name, value in method.step(step).items():
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{stage} step {step}: {name} is {value}; lower the learning rates"
                    )
                sums.setdefault(name, []).append(value)
            # A short memory first, so that the average forgets where the student started.
            moved = step - average_from
            decay = min(ema, (1 + moved) / (10 + moved)) if moved >= 0 else 0.0
            with torch.no_grad():
                for name, parameter in student.named_parameters():
                    averages[name].lerp_(parameter, 1 - decay)
            step += 1
            if step % log_every == 0 or step == steps:
                means = {n: sum(v) / len(v) for n, v in _joined(ranks.gather(sums)).items()}
                sums.clear()
                if ranks.is_first:
                    seconds = time.monotonic() - started
                    _append(folder / METRICS, {"stage": stage, "step": step, "seconds": seconds, **means})
                    report(stage, step, steps, means)
            stop = ranks.any(bool(came), device)
            if stop or step == steps or step % save_every == 0:
                save()
            if stop and step < steps:
                raise Stopped(came[0] if came else signal.SIGTERM)
    return averages


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
