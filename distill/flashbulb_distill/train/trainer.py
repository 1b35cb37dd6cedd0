"""The training loop. It knows steps, averages, logs and checkpoints, and nothing of any method."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoint import load_checkpoint, save_checkpoint

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
) -> dict[str, Tensor]:
    """Run a method to its last step, going on from the folder's checkpoint, and return the averaged student.

    Args:
        average_from: the step from which the student moves; the average starts there.
        identity: hash of recipe and inputs; a checkpoint of another one is refused.
        report: called with (stage, step, steps, means of the logs since the last call).
    Returns:
        The exponential moving average of the student's parameters, by name.
    Raises:
        FloatingPointError: a logged scalar is not finite.
        ValueError: the checkpoint is damaged or belongs to another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    student = method.modules["student"]
    averages = {name: p.detach().clone() for name, p in student.named_parameters()}
    path = folder / "checkpoint.safetensors"
    step = 0
    if path.exists():
        step = load_checkpoint(path, method.modules, method.optimizers, averages, identity)

    def save() -> None:
        save_checkpoint(path, step, method.modules, method.optimizers, averages, identity)

    sums: dict[str, list[float]] = {}
    started = time.monotonic()
    try:
        while step < steps:
            logs = method.step(step)
            for name, value in logs.items():
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
                means = {name: sum(values) / len(values) for name, values in sums.items()}
                sums.clear()
                seconds = time.monotonic() - started
                _append(folder / "metrics.jsonl", {"stage": stage, "step": step, "seconds": seconds, **means})
                report(stage, step, steps, means)
            if step % save_every == 0 and step < steps:
                save()
    except KeyboardInterrupt:
        save()
        raise
    save()
    return averages


def _append(path: Path, record: Mapping[str, object]) -> None:
    with path.open("a") as handle:
        handle.write(json.dumps(record) + "\n")
