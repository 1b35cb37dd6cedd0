"""The health guard: is training going where runs that ended well went? If not: slow down, go back, or stop.

Every `every` steps the guard takes a look: means of the logged scalars since the look before, and a probe of the
student's samples beside the teacher's. Figures out of their bands for `patience` looks in a row are a violation.
The first one lowers all learning rates; the next one also goes back to the last checkpoint whose look was good; then
the run is stopped. All of it is a pure function of the looks, and its state is part of the checkpoint.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from .recipe import GuardRecipe, RecipeError

Action = Literal["go on", "reduce", "roll back", "stop"]
BANDS = "guard_bands.json"
GUARD = "guard.json"
HISTORY = 5  # looks that "its usual size" is the median of


class Frozen(BaseModel):
    """Base of the guard's records."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Band(Frozen):
    """Where a figure stayed in runs that ended well. `figure` may end with * to mean all that begin so."""

    figure: str
    low: float | None = None
    high: float | None = None
    meaning: str
    origin: str

    def holds(self, value: float) -> bool:
        """Tell whether a value lies inside; what is not a number does not."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def covers(self, figure: str) -> bool:
        """Tell whether the band is of this figure."""
        return figure.startswith(self.figure[:-1]) if self.figure.endswith("*") else figure == self.figure


class Look(Frozen):
    """What the guard saw after a step, and what of it lay outside its band."""

    step: int
    figures: dict[str, float]
    faults: tuple[str, ...] = ()


class Event(Frozen):
    """What the guard did, and why."""

    step: int
    action: Action
    reason: str
    to_step: int | None = None


class GuardState(Frozen):
    """All that the guard remembers: part of every checkpoint."""

    looks: tuple[Look, ...] = ()
    events: tuple[Event, ...] = ()
    rate: float = 1.0  # times the recipe's learning rates
    reductions: int = 0
    rollbacks: int = 0
    good_step: int = 0
    seen: dict[str, tuple[float, int]] = Field(default_factory=dict)  # sums and counts since the last look


class Collapsed(ValueError):
    """The guard stopped a run that neither a lower rate nor going back has mended."""


def note(state: GuardState, means: Mapping[str, float]) -> GuardState:
    """Add logged means to what the next look will see."""
    seen = dict(state.seen)
    for name, value in means.items():
        total, count = seen.get(name, (0.0, 0))
        seen[name] = (total + value, count + 1)
    return state.model_copy(update={"seen": seen})


def figures_of(state: GuardState, probe: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of a look: means of what was logged, the probe, and sizes relative to earlier looks.

    `norm_growth`: of each gradient norm, relative to the median of the last looks; `fake_lag` the same of the fake
    score's own loss: it grows when the student moves faster than the fake score can follow. `diversity_kept` and
    `contrast_kept`: of the most that good looks saw, since a student may start below its teacher and must not fall; of
    the teacher's own where they saw more, since a noisy start is nothing to keep.
    """
    figures = {name: total / count for name, (total, count) in state.seen.items()}
    figures |= probe
    for name, value in list(figures.items()):
        is_norm = name.endswith("_norm")
        if not is_norm and name != "fake_loss":
            continue
        before = [look.figures[name] for look in state.looks[-HISTORY:] if name in look.figures]
        if len(before) >= 2:
            usual = sorted(before)[len(before) // 2]
            figures[f"norm_growth/{name}" if is_norm else "fake_lag"] = value / max(usual, 1e-12)
    for name in ("diversity", "contrast"):
        good = (look.figures for look in state.looks if not look.faults)
        best = max((earlier[name] for earlier in good if name in earlier), default=0.0)
        if name in figures and best > 0:
            figures[f"{name}_kept"] = figures[name] / min(best, 1.0)
    return figures


def faults_of(figures: Mapping[str, float], bands: Sequence[Band]) -> tuple[str, ...]:
    """Say of each figure outside its band what it is and where it was expected."""
    faults = []
    for name, value in figures.items():
        for band in bands:
            if band.covers(name) and not (math.isfinite(value) and band.holds(value)):
                low = "-inf" if band.low is None else f"{band.low:g}"
                high = "inf" if band.high is None else f"{band.high:g}"
                faults.append(f"{name} {value:.3g}, expected {low} to {high}: {band.meaning}")
    return tuple(faults)


def decide(
    state: GuardState, step: int, figures: Mapping[str, float], bands: Sequence[Band], recipe: GuardRecipe
) -> tuple[Action, GuardState]:
    """Add a look and say what to do. The state that goes on after "roll back" has forgotten the looks taken back."""
    look = Look(step=step, figures=dict(figures), faults=faults_of(figures, bands))
    looks = (*state.looks, look)
    state = state.model_copy(update={"looks": looks, "seen": {}})
    if not look.faults:
        return "go on", state.model_copy(update={"good_step": step})
    # Bad looks in a row, since the rates were last lowered; going back has taken back the looks itself.
    last = state.events[-1] if state.events else None
    since = last.step if last is not None and last.action == "reduce" else -1
    bad = 0
    for earlier in reversed(looks):
        if not earlier.faults or earlier.step <= since:
            break
        bad += 1
    if bad < recipe.patience:
        return "go on", state
    reason = f"{'; '.join(look.faults)}, for {bad} looks in a row"
    if state.reductions < recipe.reductions:
        event = Event(step=step, action="reduce", reason=reason)
        changes = {"rate": state.rate * recipe.reduce, "reductions": state.reductions + 1}
        return "reduce", state.model_copy(update={**changes, "events": (*state.events, event)})
    return broken(state, step, reason, recipe)


def broken(state: GuardState, step: int, reason: str, recipe: GuardRecipe) -> tuple[Action, GuardState]:
    """Say what to do when a scalar is no number any more: the weights are spoilt, so a lower rate alone is no help."""
    if state.rollbacks >= recipe.rollbacks:
        event = Event(step=step, action="stop", reason=reason)
        return "stop", state.model_copy(update={"events": (*state.events, event)})
    return _back(state, step, reason, recipe)


def _back(state: GuardState, step: int, reason: str, recipe: GuardRecipe) -> tuple[Action, GuardState]:
    """Return the state that goes on from the last good look; it has forgotten what came after it."""
    event = Event(step=step, action="roll back", reason=reason, to_step=state.good_step)
    return "roll back", state.model_copy(
        update={
            "looks": tuple(look for look in state.looks if look.step <= state.good_step),
            "events": (*state.events, event),
            "rate": state.rate * recipe.reduce,
            "rollbacks": state.rollbacks + 1,
            "seen": {},
        }
    )


@dataclass
class Guard:
    """The guard of one stage, as the training loop uses it.

    Args:
        probe: (step, student) -> figures of its samples.
    """

    recipe: GuardRecipe
    bands: Sequence[Band]
    probe: Callable[[int, Any], dict[str, float]]
    state: GuardState = field(default_factory=GuardState)

    def begin(self, student: nn.Module) -> GuardState:
        """Return the state before the first step: what the student draws then is what it must not lose."""
        start = Look(step=0, figures=figures_of(self.state, self.probe(0, student)))
        return self.state.model_copy(update={"looks": (start,)})

    def look(self, step: int, student: nn.Module) -> tuple[Action, GuardState]:
        """Look at the student after `step` steps; return what to do and the state to go on with."""
        figures = figures_of(self.state, self.probe(step, student))
        return decide(self.state, step, figures, self.bands, self.recipe)

    def write(self, folder: Path) -> None:
        """Write what was seen and done, for people and the report."""
        temporary = folder / ".guard.json.tmp"
        bands = [band.model_dump() for band in self.bands]
        record = {"bands": bands, **self.state.model_dump(mode="json", exclude={"seen"})}
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(folder / GUARD)


def load_bands(path: Path | None, stage: str) -> tuple[Band, ...]:
    """Read the bands of a stage: {"adm": [{"figure": ...}, ...], ...}; the built-in ones for None.

    Raises:
        RecipeError: no such file, or not of this form.
    """
    try:
        text = (path or files(__package__).joinpath(BANDS)).read_text(encoding="utf-8")
        stages = json.loads(text)
        return tuple(Band.model_validate(band) for band in [*stages.get("all", []), *stages.get(stage, [])])
    except FileNotFoundError:
        raise RecipeError(f"guard.bands: expected a JSON file of bands, found no {path}") from None
    except (json.JSONDecodeError, ValidationError, AttributeError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"guard.bands: expected lists of bands by stage in {path}, got {first}") from error
