"""Measure a run's teacher and student by pictures of the reference's prompts."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .evaluate.grid import save_grid
from .evaluate.reference import Reference, load_reference
from .evaluate.run import EvaluationResult, evaluate, reference_prompts
from .export.generate import Generate, teacher_images
from .provenance import code_version
from .teachers.teacher import Teacher
from .train.recipe import EvaluateRecipe

GRID_COLUMNS = 10


@dataclass(frozen=True)
class Measurement:
    """What a recipe measures, on seeds that training never used."""

    recipe: EvaluateRecipe
    progress: Callable[[str, int, int], None]

    @cached_property
    def reference(self) -> Reference:
        """The real pictures to measure against."""
        return load_reference(self.recipe.reference)

    def by_teacher(self, teacher: Teacher) -> Generate:
        """Return the teacher's guided sampler."""
        return teacher_images(teacher, self.recipe.teacher_steps, self.recipe.teacher_guidance)

    def measure(
        self, name: str, generate: Generate, path: Path, made_by: Mapping[str, str]
    ) -> EvaluationResult:
        """Measure what `generate` draws, and write the result."""
        recipe = self.recipe
        result = evaluate(
            generate,
            self.reference,
            reference_prompts(self.reference),
            range(recipe.first_seed, recipe.first_seed + recipe.num_seeds),
            num_components=recipe.num_components,
            provenance={
                **made_by,
                "command": " ".join(["flashbulb", *sys.argv[1:]]),
                "commit": code_version(),
            },
            progress=lambda done, total: self.progress(f"evaluate {name}", done, total),
        )
        path.write_text(result.model_dump_json(indent=1) + "\n")
        return result

    def save_grid(self, path: Path, rows: Mapping[str, Generate]) -> None:
        """Draw forty prompts evenly through the list with unpicked seeds 0, 1, 2, ...: one row a model."""
        prompts = reference_prompts(self.reference)
        spread = np.linspace(0, len(prompts) - 1, min(40, len(prompts))).astype(int)
        texts = [prompts[i].text for i in spread]
        seeds = list(range(len(texts)))
        drawn = [(name, list(generate(texts, seeds))) for name, generate in rows.items()]
        save_grid(drawn, texts, path, max_columns=GRID_COLUMNS)
