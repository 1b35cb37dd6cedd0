"""The race on a recipe's own teacher: the same start, pairs, prompts, batch and number of student updates for all.

Where the recipe has a section `regression`, its student is the common start; else the teacher is. A method for which
the recipe has no section takes its rates, batch and guidance from the nearest one that is there.

    <out>/pairs, <out>/regression    as in a run
    <out>/race/<entry>/<seed>/       a folder a stage, evaluation/
    <out>/race/race.json, table.md
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..evaluate.run import EvaluationResult
from ..export.generate import student_images
from ..pairs.store import read_pairs
from ..run import STUDENT, Run
from ..stage import StageFolder
from ..train.build import Inputs, build, check_here, student_of
from ..train.checkpoint import read_module
from ..train.recipe import (
    DmdRecipe,
    LaddRecipe,
    LcmRecipe,
    Recipe,
    RecipeError,
    StageRecipe,
    digest,
)
from ..train.trainer import train
from .entries import Entry, Stage
from .result import RaceResult, RunResult, race_table

GAN_WEIGHT = 5e-3  # DMD2's

COLUMNS = {
    "style_coverage": "style coverage",
    "retrieval_top1": "retrieval, top 1",
    "frechet": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "diversity": "diversity",
}


def section_of(recipe: Recipe, stage: Stage) -> tuple[str, StageRecipe]:
    """Return the recipe's section for a stage and its name, made from the nearest one where there is none.

    Raises:
        RecipeError: neither is there.
    """
    if stage in ("dmd", "dmd2"):
        return "dmd", _dmd(recipe, gan=stage == "dmd2")
    own = getattr(recipe, stage)
    if own is not None:
        return stage, cast(StageRecipe, own)
    if stage == "ladd":
        near = _needed(recipe, "adp")
        return stage, LaddRecipe.model_validate(_shared(near, LaddRecipe))
    if stage == "lcm" and recipe.regression is not None and recipe.pairs is not None:
        near = recipe.regression
        made = _shared(near, LcmRecipe) | {"guidance": recipe.pairs.guidance}
        return stage, LcmRecipe.model_validate(made)
    return stage, _needed(recipe, stage)


def _dmd(recipe: Recipe, *, gan: bool) -> DmdRecipe:
    adm = recipe.adm
    if recipe.dmd is not None:
        made = recipe.dmd.model_dump()
    else:
        made = _shared(_needed(recipe, "adm"), DmdRecipe)
    taps = made.get("taps") or (adm.taps if adm is not None else ())
    weight = made.get("gan_weight") or GAN_WEIGHT
    return DmdRecipe.model_validate(made | {"taps": taps, "gan_weight": weight if gan else 0.0})


def _shared(near: StageRecipe, kind: type[StageRecipe]) -> dict[str, object]:
    return {name: value for name, value in near.model_dump().items() if name in kind.model_fields}


def _needed(recipe: Recipe, stage: str) -> StageRecipe:
    section = getattr(recipe, stage)
    if section is None:
        raise RecipeError(f"{stage}: expected a section of that name to race by, the recipe has none")
    return cast(StageRecipe, section)


@dataclass(frozen=True)
class PictureRace:
    """A race in the folder of a run, whose pairs and start it shares."""

    run: Run
    entries: Sequence[Entry]
    seeds: Sequence[int]
    moves: int

    def __call__(self, provenance: Mapping[str, str]) -> RaceResult:
        """Run all entries with all seeds, each to its evaluation; what is done is not repeated.

        Raises:
            RecipeError: what is there was made otherwise, with another number of moves for example.
        """
        run = self.run
        # Refuse before hours of training.
        run.measurement.reference_sha256  # noqa: B018
        raced = [name for name in run.recipe.stages if any(name in entry.stages for entry in self.entries)]
        check_here(run.recipe, run.trained_teacher, run.ranks, raced)
        made_of = run.pairs()
        start: dict[str, Tensor] | None = None
        if run.recipe.regression is not None:
            made_of = run.regression()
            start = load_file(run.out / "regression" / STUDENT)
        runs = [self._race(entry, seed, made_of, start) for seed in self.seeds for entry in self.entries]
        if start is not None:
            folder = run.out / "race" / "start"
            found = self._measure(folder, made_of, start, "start")
            runs.append(_result("start", "the regression that all start from", run.recipe.seed, 0.0, found))
        course: dict[str, float | int | str] = {"moves": self.moves, "recipe": run.recipe.sha256()}
        result = RaceResult(
            on=run.recipe.name,
            course=course,
            seeds=tuple(self.seeds),
            runs=tuple(runs),
            provenance=dict(provenance),
        )
        folder = run.out / "race"
        (folder / "race.json").write_text(result.model_dump_json(indent=1) + "\n")
        columns = COLUMNS if "style_coverage" in runs[0].figures else {name: name for name in runs[0].figures}
        (folder / "table.md").write_text(race_table(result, columns))
        return result

    def _race(self, entry: Entry, seed: int, made_of: str, start: Mapping[str, Tensor] | None) -> RunResult:
        folder = self.run.out / "race" / entry.name / str(seed)
        weights, seconds = start, 0.0
        heads: dict[str, Tensor] | None = None
        for stage in entry.stages:
            part = self._folder(entry, stage, seed, made_of)
            path, made_of = part.path, part.identity
            if not part.is_done():
                part.claim()
                began = time.process_time()
                weights = self._train(entry, stage, part, weights, heads)
                (path / "cpu_seconds").write_text(str(time.process_time() - began))
                save_file({name: value.contiguous() for name, value in weights.items()}, path / STUDENT)
                part.finish()
            weights = load_file(path / STUDENT)
            seconds += float((path / "cpu_seconds").read_text())
            heads = read_module(path, "latent") if entry.carry_heads else None
        assert weights is not None
        found = self._measure(folder, made_of, weights, entry.name)
        return _result(entry.name, entry.title, seed, seconds, found)

    def _folder(self, entry: Entry, stage: Stage, seed: int, made_of: str) -> StageFolder:
        """Return the folder of an entry's stage, with the recipe that it is trained by."""
        run = self.run
        name, section = section_of(run.recipe, stage)
        ratio = getattr(section, "update_ratio", 1)  # steps to a move, of which the warm-up has none
        steps = section.average_from + self.moves // len(entry.stages) * ratio
        section = section.model_copy(update={"steps": steps})
        inputs = {"parent": made_of, "time_steps": run.recipe.time_steps, "seed": seed} | run.networks(name)
        identity = digest(
            inputs | {"recipe": section.model_dump(mode="json"), "carry_heads": entry.carry_heads}
        )
        recipe = run.recipe.model_copy(update={name: section, "seed": seed})
        return StageFolder(run.out / "race" / entry.name / str(seed) / stage, identity, recipe)

    def _train(
        self,
        entry: Entry,
        stage: Stage,
        part: StageFolder,
        start: Mapping[str, Tensor] | None,
        heads: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        run, recipe = self.run, part.recipe
        name, section = section_of(recipe, stage)
        pairs = read_pairs(run.out / "pairs")
        inputs = Inputs(recipe, run.trained_teacher, run.condition, run.uncond, pairs, start, heads)
        return train(
            build(name, inputs),
            part.path,
            stage=f"{entry.name} seed {recipe.seed} {stage}",
            steps=section.steps,
            ema=section.ema,
            identity=part.identity,
            average_from=section.average_from,
            report=run.progress,
        )

    def _measure(self, folder: Path, made_of: str, weights: Mapping[str, Tensor], name: str) -> BaseModel:
        run = self.run
        part = StageFolder(folder / "evaluation", run.evaluation_of({"student": made_of}), run.recipe)
        path = part.path / "evaluation.json"
        if not part.is_done():
            part.claim()
            images = student_images(
                run.teacher, student_of(run.teacher, weights, run.recipe), run.recipe.time_steps
            )
            found = run.measurement.measure(name, images, {"recipe": run.recipe.sha256()})
            path.write_text(found.model_dump_json(indent=1) + "\n")
            part.finish()
        result: BaseModel = run.measurement.read(path)
        return result


def _result(name: str, title: str, seed: int, seconds: float, found: BaseModel) -> RunResult:
    """Take the figures of pictures, or those of clips of trained subjects."""
    part = found.metrics if isinstance(found, EvaluationResult) else getattr(found, "trained")  # noqa: B009
    values = {figure: getattr(value, "value", value) for figure, value in part}
    figures = {figure: float(value) for figure, value in values.items() if isinstance(value, (int, float))}
    return RunResult(entry=name, title=title, seed=seed, cpu_seconds=seconds, figures=figures)
