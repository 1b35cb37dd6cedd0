"""What a run measures of its teacher and its student: pictures of the reference's prompts, or clips of them."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel

from .evaluate.clip_table import clip_shares, clip_table, save_clip_sheet
from .evaluate.clips import ClipEvaluation, ClipReference, evaluate_clips, load_clip_reference
from .evaluate.compare import compare, markdown_table
from .evaluate.grid import save_grid
from .evaluate.reference import Reference, load_reference
from .evaluate.run import EvaluationResult, evaluate, reference_prompts
from .export.generate import Generate
from .provenance import code_version
from .train.recipe import EvaluateRecipe

GRID_COLUMNS = 10
Progress = Callable[[str, int, int], None]
Result = TypeVar("Result", bound=BaseModel)


class Measurement(Protocol[Result]):
    """What a recipe measures, on seeds that training never used."""

    @property
    def reference_sha256(self) -> str:
        """The hash of what is compared with."""
        ...

    def measure(self, name: str, generate: Generate, made_by: Mapping[str, str]) -> Result:
        """Measure what `generate` draws."""
        ...

    def read(self, path: Path) -> Result:
        """Read a result that was written as JSON."""
        ...

    def table(self, student: Result, teacher: Result) -> str:
        """Return both results in one Markdown table."""
        ...

    def shares(self, student: Result, teacher: Result) -> dict[str, float]:
        """Return the student's figures as shares of the teacher's, by name."""
        ...

    def save_grid(self, path: Path, rows: Mapping[str, Generate]) -> None:
        """Draw prompts evenly through the list with unpicked seeds: one row a model."""
        ...


def measurement_of(recipe: EvaluateRecipe, *, is_video: bool, progress: Progress) -> Measurement[Any]:
    """Return what the recipe measures."""
    return ClipMeasurement(recipe, progress) if is_video else PictureMeasurement(recipe, progress)


def _seeds(recipe: EvaluateRecipe) -> range:
    return range(recipe.first_seed, recipe.first_seed + recipe.num_seeds)


def _provenance(made_by: Mapping[str, str]) -> dict[str, str]:
    return {**made_by, "command": " ".join(["flashbulb", *sys.argv[1:]]), "commit": code_version()}


@dataclass(frozen=True)
class PictureMeasurement:
    """Pictures against a reference of concepts and styles."""

    recipe: EvaluateRecipe
    progress: Progress

    @cached_property
    def reference(self) -> Reference:
        """The real pictures to measure against."""
        return load_reference(self.recipe.reference)

    @property
    def reference_sha256(self) -> str:
        """The hash of the real pictures."""
        return self.reference.sha256

    def measure(self, name: str, generate: Generate, made_by: Mapping[str, str]) -> EvaluationResult:
        """Measure what `generate` draws."""
        return evaluate(
            generate,
            self.reference,
            reference_prompts(self.reference),
            _seeds(self.recipe),
            num_components=self.recipe.num_components,
            provenance=_provenance(made_by),
            progress=lambda done, total: self.progress(f"evaluate {name}", done, total),
        )

    def read(self, path: Path) -> EvaluationResult:
        """Read a result."""
        return EvaluationResult.model_validate_json(path.read_text())

    def table(self, student: EvaluationResult, teacher: EvaluationResult) -> str:
        """Return both in one table."""
        return markdown_table({"student": student, "teacher": teacher})

    def shares(self, student: EvaluationResult, teacher: EvaluationResult) -> dict[str, float]:
        """Return the student's shares."""
        found = compare(student, teacher)
        return {name: estimate.value for name, estimate in found if estimate is not None}

    def save_grid(self, path: Path, rows: Mapping[str, Generate]) -> None:
        """Draw forty prompts evenly through the list with unpicked seeds 0, 1, 2, ...: one row a model."""
        prompts = reference_prompts(self.reference)
        spread = np.linspace(0, len(prompts) - 1, min(40, len(prompts))).astype(int)
        texts = [prompts[i].text for i in spread]
        seeds = list(range(len(texts)))
        drawn = [(name, list(generate(texts, seeds))) for name, generate in rows.items()]
        save_grid(drawn, texts, path, max_columns=GRID_COLUMNS)


@dataclass(frozen=True)
class ClipMeasurement:
    """Clips against real ones of subjects and motions."""

    recipe: EvaluateRecipe
    progress: Progress

    @cached_property
    def reference(self) -> ClipReference:
        """The real clips to measure against."""
        return load_clip_reference(self.recipe.reference)

    @property
    def reference_sha256(self) -> str:
        """The hash of the real clips."""
        return self.reference.sha256

    def measure(self, name: str, generate: Generate, made_by: Mapping[str, str]) -> ClipEvaluation:
        """Measure what `generate` draws."""
        return evaluate_clips(
            generate,
            self.reference,
            _seeds(self.recipe),
            num_components=self.recipe.num_components,
            provenance=_provenance(made_by),
            progress=lambda done, total: self.progress(f"evaluate {name}", done, total),
        )

    def read(self, path: Path) -> ClipEvaluation:
        """Read a result."""
        return ClipEvaluation.model_validate_json(path.read_text())

    def table(self, student: ClipEvaluation, teacher: ClipEvaluation) -> str:
        """Return both in one table."""
        return clip_table({"student": student, "teacher": teacher})

    def shares(self, student: ClipEvaluation, teacher: ClipEvaluation) -> dict[str, float]:
        """Return the student's shares."""
        return clip_shares(student, teacher)

    def save_grid(self, path: Path, rows: Mapping[str, Generate]) -> None:
        """Draw every held-out pair with unpicked seeds 0, 1, 2, ...: a line of every second frame a model."""
        prompts = [label.prompt for label in self.reference.labels["held-out"]]
        seeds = list(range(len(prompts)))
        save_clip_sheet(path, [(name, generate(prompts, seeds)) for name, generate in rows.items()], prompts)
