"""Export what a run made: each family's student in its own kind of bundle."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from ..bundle import Guidance
from ..teachers.demo import DemoTeacher
from ..teachers.denoiser import Denoiser
from ..teachers.pretrained import PretrainedTeacher
from ..teachers.teacher import Teacher
from ..train.recipe import Recipe
from .bundle import DemoStudent, export_bundle
from .parity import Parity
from .student import export_student


def export_run(
    folder: Path,
    recipe: Recipe,
    teacher: Teacher,
    student: Denoiser,
    *,
    parents: Mapping[str, str],
    metrics: Mapping[str, float],
) -> list[Parity]:
    """Write a verified bundle of a recipe's student to `folder`, and return what the parity gate measured.

    Raises:
        FileExistsError: `folder` exists; published versions never change.
        ParityError: an exported graph does not compute what its module does.
    """
    if isinstance(teacher, PretrainedTeacher):
        return export_student(
            folder,
            recipe.family,
            student,
            teacher.codec,
            # onnxruntime has no bfloat16 on a CPU, whatever the training computed in
            replace(teacher.source, dtype=torch.float32).prompts(),
            name=recipe.name,
            version=recipe.version,
            time_steps=recipe.time_steps,
            shape=teacher.shape,
            guidance=Guidance(mode="baked", scale=recipe.guidance),
            fps=recipe.export.fps,
            max_batch=recipe.export.max_batch,
            parents=parents,
            licence=recipe.export.licence,
            attribution=recipe.export.attribution,
            tolerance=recipe.export.tolerance,
        )
    return export_bundle(
        folder,
        recipe.family,
        cast(DemoTeacher[Any, Any], teacher),
        cast(DemoStudent, student),
        name=recipe.name,
        version=recipe.version,
        time_steps=recipe.time_steps,
        guidance=recipe.guidance,
        max_batch=recipe.export.max_batch,
        parents=parents,
        metrics=metrics,
        licence=recipe.export.licence,
        attribution=recipe.export.attribution,
        tolerance=recipe.export.tolerance,
        fps=recipe.export.fps,
    )
