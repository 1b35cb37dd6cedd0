"""Draw a run's pictures, read its folder, and write report.html."""

import platform
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..export.generate import Generate, student_images, teacher_images
from ..teachers.teacher import Teacher
from ..train.build import student_of
from ..train.checkpoint import read_module
from ..train.probe import evenly
from ..train.recipe import Recipe, ReportRecipe
from .collect import collect
from .page import page
from .pictures import Drawn, draw, fewer_steps

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
        drawn = draw(_models(out, recipe, teacher, asked.teacher_steps), chosen, seeds, progress)
    contents = collect(out, recipe.stages, bundle)
    device = next(teacher.denoiser.parameters()).device
    text = page(contents, drawn, chosen, seeds, _machine(device))
    path = out / REPORT
    temporary = out / ".report.html.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def _models(
    out: Path, recipe: Recipe, teacher: Teacher, teacher_steps: int
) -> dict[tuple[str, int], Generate]:
    """The teacher first, as it samples and in as few steps as the student; then the last student, and its average."""
    steps = len(recipe.time_steps)
    models = {("teacher", teacher_steps): teacher_images(teacher, teacher_steps, recipe.guidance)}
    models[("teacher", steps)] = teacher_images(teacher, steps, recipe.guidance)
    folder = out / recipe.last_stage
    average = load_file(folder / "student.safetensors")
    last = {name: value for name, value in read_module(folder, "student").items() if name in average}
    for name, values in (("student, last weights", last), ("student, average", average)):
        student = student_of(teacher, values, recipe)
        for schedule in fewer_steps(recipe.time_steps):
            models[(name, len(schedule))] = student_images(teacher, student, schedule)
    return models


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
