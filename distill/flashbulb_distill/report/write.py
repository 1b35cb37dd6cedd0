"""Draw a run's pictures, read its folder, and write report.html."""

import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..export.generate import Generate, student_images, teacher_images
from ..teachers.teacher import Teacher
from ..train.build import student_of
from ..train.checkpoint import read_module
from ..train.probe import evenly
from ..train.recipe import Recipe, ReportRecipe
from .collect import collect
from .page import page
from .pictures import Drawn, Model, draw, fewer_steps

REPORT = "report.html"


def write_report(
    out: Path,
    recipe: Recipe,
    teacher: Teacher,
    prompts: tuple[str, ...],
    bundle: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the report of a run whose stages are done, and return its path."""
    asked = recipe.report or ReportRecipe(prompts=0)
    chosen = [prompts[place] for place in evenly(prompts, asked.prompts)] if asked.prompts else []
    seeds = range(asked.seeds)
    drawn: list[Drawn] = []
    if chosen:
        for prompt in chosen:  # before the clock runs: text encoders of gigabytes are loaded for it
            teacher.encode([prompt])
        try:
            drawn = draw(_models(out, recipe, teacher, asked.teacher_steps), chosen, seeds, progress)
        except torch.OutOfMemoryError:  # of a run that is done, the bundle included
            print(
                "report: no memory to draw on this device, so it has no pictures; "
                "flashbulb distill report --device cpu draws them",
                file=sys.stderr,
            )
    contents = collect(out, recipe.stages, bundle)
    device = next(teacher.denoiser.parameters()).device
    text = page(contents, drawn, chosen, seeds, _machine(device))
    path = out / REPORT
    temporary = out / ".report.html.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def _models(out: Path, recipe: Recipe, teacher: Teacher, teacher_steps: int) -> list[Model]:
    """The teacher first, as it samples and in as few steps as the student; then the last student, and its average."""
    folder = out / recipe.last_stage

    def taught(steps: int) -> Model:
        return Model("teacher", steps, lambda: teacher_images(teacher, steps, recipe.guidance))

    def learnt(name: str, read: Callable[[], Mapping[str, Tensor]], schedule: tuple[float, ...]) -> Model:
        def load() -> Generate:
            return student_images(teacher, student_of(teacher, read(), recipe), schedule)

        return Model(name, len(schedule), load)

    def average() -> Mapping[str, Tensor]:
        return load_file(folder / "student.safetensors")

    def last() -> Mapping[str, Tensor]:
        names = average()
        return {name: value for name, value in read_module(folder, "student").items() if name in names}

    students = {"student, last weights": last, "student, average": average}
    return [
        *(taught(steps) for steps in dict.fromkeys((teacher_steps, len(recipe.time_steps)))),
        *(
            learnt(name, read, schedule)
            for name, read in students.items()
            for schedule in fewer_steps(recipe.time_steps)
        ),
    ]


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
