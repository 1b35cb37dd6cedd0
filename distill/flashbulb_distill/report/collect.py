"""Read what a run left in its folder, for the report. What is not there is left out; nothing is computed anew."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import BundleError, open_bundle

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A training stage: its logged lines, and the guard's record."""

    name: str
    lines: tuple[Json, ...]
    guard: Json | None

    @property
    def seconds(self) -> float:
        """The time that its steps took, over all resumes: each starts its clock anew."""
        total = last = 0.0
        for line in self.lines:
            if line["seconds"] < last:
                total += last
            last = line["seconds"]
        return total + last

    def series(self) -> dict[str, list[tuple[float, float]]]:
        """Return (step, value) of every scalar, by name."""
        found: dict[str, list[tuple[float, float]]] = {}
        for line in self.lines:
            for name, value in line.items():
                if name not in ("stage", "step", "seconds"):
                    found.setdefault(name, []).append((line["step"], value))
        return found


@dataclass(frozen=True)
class Contents:
    """All that a run's folder says."""

    record: Json  # recipe.json
    stages: tuple[Stage, ...]
    evaluations: Mapping[str, Json]  # student, teacher
    doctor: Json | None
    manifest: Json | None


def collect(out: Path, stages: Iterable[str], bundle: Path) -> Contents:
    """Read a run's folder.

    Args:
        stages: the recipe's training stages.   bundle: where its bundle is, or would be.
    """
    evaluations = {name: _read(out / "evaluation" / f"{name}.json") for name in ("student", "teacher")}
    return Contents(
        record=_read(out / "recipe.json") or {},
        stages=tuple(
            Stage(name, _lines(out / name / "metrics.jsonl"), _read(out / name / "guard.json"))
            for name in stages
        ),
        evaluations={name: found for name, found in evaluations.items() if found is not None},
        doctor=_read(out / "doctor.json"),
        manifest=_manifest(bundle),
    )


def estimates(evaluation: Json) -> dict[str, tuple[float, float | None, float | None]]:
    """Return an evaluation's figures as (value, low, high), by name; nested ones are named like trained.recall."""
    found: dict[str, tuple[float, float | None, float | None]] = {}

    def walk(value: object, name: str) -> None:
        if isinstance(value, bool) or value is None:
            return
        if isinstance(value, (int, float)):
            found[name] = (float(value), None, None)
        elif isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
            found[name] = (value["value"], value["low"], value["high"])
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else key)

    parts = {key: evaluation[key] for key in ("metrics", "trained", "held_out") if key in evaluation}
    walk(parts.pop("metrics", {}), "")
    walk(parts, "")
    return found


def _read(path: Path) -> Json | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _lines(path: Path) -> tuple[Json, ...]:
    if not path.is_file():
        return ()
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def _manifest(bundle: Path) -> Json | None:
    try:
        manifest: Json = open_bundle(bundle).manifest.model_dump(mode="json")
    except (BundleError, OSError):
        return None
    return manifest
