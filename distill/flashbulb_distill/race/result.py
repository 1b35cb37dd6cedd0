"""What a race found: every run's figures, their means with intervals over seeds, a table, a file."""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import t as student_t


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunResult(_Frozen):
    """One entry with one seed: seconds of CPU to train it, and what its samples are worth."""

    entry: str
    title: str
    seed: int
    cpu_seconds: float
    figures: dict[str, float]


class RaceResult(_Frozen):
    """A whole race, with all that is needed to repeat it."""

    on: str
    course: dict[str, float | int | str]
    seeds: tuple[int, ...]
    runs: tuple[RunResult, ...]
    provenance: dict[str, str]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval by Student's t; None for a single value."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return float(x.mean()), None
    half = student_t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean()), float(half)


def race_table(result: RaceResult, columns: Mapping[str, str]) -> str:
    """Return a Markdown table, a row per entry: means over seeds and half of their 95 % intervals.

    Args:
        columns: figure -> its title.
    """
    lines = ["| | method | " + " | ".join(columns.values()) + " | CPU s |"]
    lines.append("|---|---|" + "---|" * (len(columns) + 1))
    for name in dict.fromkeys(run.entry for run in result.runs):
        own = [run for run in result.runs if run.entry == name]
        cells = [_cell([run.figures[figure] for run in own if figure in run.figures]) for figure in columns]
        cells.append(f"{np.mean([run.cpu_seconds for run in own]):.0f}")
        lines.append(f"| {name} | {own[0].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, half = interval(values)
    digits = 1 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"
