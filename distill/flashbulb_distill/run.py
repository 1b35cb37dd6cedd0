"""From teacher to verified bundle: pairs -> (regression ->) adp -> adm -> evaluate -> export, hashed and restartable.

    <out>/recipe.json           the resolved recipe
    <out>/pairs/                index.jsonl, shards
    <out>/regression/           as adp/, where the recipe asks for it
    <out>/adp/, <out>/adm/      metrics.jsonl, checkpoint-*.safetensors, student.safetensors
    <out>/teacher/              evaluation.json: the teacher's own figures
    <out>/evaluation/           teacher.json, student.json, table.md, grid.png
    <out>/bundle/<name>/<version>/

A stage that is done leaves stage.json with the hash of all that it was made from; it runs again only if that changed.
Pairs and training run on all ranks and their devices; evaluation and export on the first rank's CPU.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version as version_of
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .bundle import BundleError, hash_file, open_bundle
from .core.draws import Draws
from .evaluate.compare import Comparison, compare, markdown_table
from .evaluate.grid import save_grid
from .evaluate.reference import Reference, load_reference
from .evaluate.run import EvaluationResult, Prompt, evaluate, reference_prompts
from .export.bundle import export_bundle
from .export.generate import Generate, student_images, teacher_images
from .export.parity import Parity
from .pairs.generate import generate_pairs
from .pairs.store import read_pairs
from .ranks import ALONE, Ranks
from .teachers.denoiser import Condition
from .teachers.emoji import EmojiDenoiser, EmojiTeacher, load_emoji_teacher
from .train.build import build_adm, build_adp, build_regression, student_of
from .train.recipe import EvaluateRecipe, Recipe, RecipeError, digest
from .train.trainer import Method, train

STUDENT = "student.safetensors"
GRID_COLUMNS = 10
CPU = torch.device("cpu")


class Progress:
    """Say how far a stage is: one changing line on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._last = 0.0
        self._started: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, total: int, logs: Mapping[str, float] | None = None) -> None:
        """Report `done` of `total` of a stage, and scalars."""
        now = time.monotonic()
        started, first = self._started.setdefault(stage, (now, done))
        terminal = sys.stderr.isatty()
        if done < total and now - self._last < (0.2 if terminal else 10):
            return
        self._last = now
        left = (now - started) / max(done - first, 1) * (total - done)
        scalars = "".join(f"  {name} {value:.3g}" for name, value in (logs or {}).items())
        line = f"{stage} {done}/{total}  {left:.0f} s left{scalars}"
        if terminal:
            print(f"\r\033[K{line[:160]}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """One run of a recipe in its folder. Inputs are loaded when a stage first needs them."""

    recipe: Recipe
    out: Path
    progress: Progress
    ranks: Ranks = ALONE
    device: torch.device = CPU

    @cached_property
    def trained_teacher(self) -> EmojiTeacher:
        """The frozen teacher on the device of the training."""
        if self.device == CPU:
            return self.teacher
        return load_emoji_teacher(
            self.recipe.teacher, bf16=self.recipe.precision == "bfloat16", device=self.device
        )

    @cached_property
    def teacher(self) -> EmojiTeacher:
        """The frozen teacher on the CPU."""
        return load_emoji_teacher(self.recipe.teacher, bf16=self.recipe.precision == "bfloat16")

    @cached_property
    def teacher_sha256(self) -> str:
        """The hash of the teacher's weight files."""
        return digest(self.teacher.sha256())

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The training prompts; a prompt that is listed twice is drawn twice as often."""
        try:
            lines = self.recipe.prompts.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise RecipeError(
                f"prompts: expected a file with a prompt a line, found no {self.recipe.prompts}"
            ) from None
        prompts = tuple(line.strip() for line in lines if line.strip())
        if not prompts:
            raise RecipeError(f"prompts: expected a prompt a line, {self.recipe.prompts} has none")
        return prompts

    @cached_property
    def condition(self) -> Condition:
        """The prompts' embeddings."""
        return self.trained_teacher.encode(self.prompts)

    @cached_property
    def uncond(self) -> Condition:
        """The empty prompt's embedding."""
        return self.trained_teacher.encode([""])

    @property
    def measures(self) -> EvaluateRecipe:
        """The recipe of the evaluation.

        Raises:
            RecipeError: the recipe has none.
        """
        if self.recipe.evaluate is None:
            raise RecipeError("evaluate: expected a section that says what to measure, got null")
        return self.recipe.evaluate

    @cached_property
    def reference(self) -> Reference:
        """The real pictures to measure against."""
        return load_reference(self.measures.reference)

    # Stages. Each returns its identity: the hash of all that it is made from.

    def pairs(self) -> str:
        """Make the teacher's ODE pairs."""
        recipe = self.recipe
        inputs = {"teacher": self.teacher_sha256, "prompts": digest(self.prompts), "seed": recipe.seed}
        identity = digest(inputs | {"recipe": recipe.pairs.model_dump(), "precision": recipe.precision})
        folder = self.out / "pairs"
        if self._done(folder, identity):
            return identity
        self._claim(folder, identity)
        generate_pairs(
            folder,
            self.trained_teacher.denoiser,
            self.prompts,
            self.condition,
            self.uncond,
            latent_shape=self.teacher.latent_shape,
            count=recipe.pairs.count,
            num_steps=recipe.pairs.num_steps,
            guidance=recipe.pairs.guidance,
            draws=Draws(recipe.seed),
            batch_size=recipe.pairs.batch_size,
            ranks=self.ranks,
            progress=lambda done, total: self.progress("pairs", done, total),
        )
        return self._finish(folder, identity)

    def regression(self) -> str:
        """Start the student by regression on the pairs, where the recipe asks for it."""
        recipe, stage = self.recipe, self.recipe.regression
        parent = self.pairs()
        if stage is None:
            return parent
        identity = digest({"pairs": parent, "recipe": stage.model_dump(), "seed": recipe.seed})

        def build() -> Method:
            pairs = read_pairs(self.out / "pairs")
            return build_regression(recipe, stage, self.trained_teacher, pairs, self.condition, self.ranks)

        return self._train("regression", identity, build, stage.steps, stage.ema, average_from=0)

    def adp(self) -> str:
        """Pre-train the student on the pairs by ADP."""
        recipe = self.recipe
        parent = self.regression()
        identity = digest({"parent": parent, "recipe": recipe.adp.model_dump(), "seed": recipe.seed})

        def build() -> Method:
            start = None if recipe.regression is None else load_file(self.out / "regression" / STUDENT)
            pairs = read_pairs(self.out / "pairs")
            return build_adp(recipe, self.trained_teacher, pairs, self.condition, start, self.ranks)

        return self._train("adp", identity, build, recipe.adp.steps, recipe.adp.ema, recipe.adp.warmup_steps)

    def adm(self) -> str:
        """Distil the pre-trained student by ADM."""
        recipe = self.recipe
        parent = self.adp()
        inputs = {"adp": parent, "time_steps": recipe.time_steps, "seed": recipe.seed}
        identity = digest(inputs | {"recipe": recipe.adm.model_dump()})

        def build() -> Method:
            start = load_file(self.out / "adp" / STUDENT)
            return build_adm(recipe, self.trained_teacher, self.condition, self.uncond, start, self.ranks)

        return self._train("adm", identity, build, recipe.adm.steps, recipe.adm.ema, recipe.adm.warmup_steps)

    def evaluate(self) -> tuple[str, Comparison | None]:
        """Measure the student beside its teacher, on seeds that training never used."""
        parent = self.adm()
        if self.recipe.evaluate is None:
            return parent, None
        return self.ranks.first(lambda: self._evaluate(parent))

    def _evaluate(self, parent: str) -> tuple[str, Comparison]:
        teacher = self.evaluate_teacher()
        identity = digest(
            {
                "adm": parent,
                "recipe": self.measures.model_dump(mode="json"),
                "reference": self.reference.sha256,
            }
        )
        folder = self.out / "evaluation"
        if not self._done(folder, identity):
            self._claim(folder, identity)
            by_student = student_images(self.teacher, self.student, self.recipe.time_steps)
            made_by = {"recipe": self.recipe.sha256()}
            student = self._measure("student", by_student, folder / "student.json", made_by)
            (folder / "teacher.json").write_text(teacher.model_dump_json(indent=1) + "\n")
            (folder / "table.md").write_text(markdown_table({"student": student, "teacher": teacher}))
            self._grid(folder / "grid.png", reference_prompts(self.reference), by_student)
            self._finish(folder, identity)
        student = EvaluationResult.model_validate_json((folder / "student.json").read_text())
        return identity, compare(student, teacher)

    def evaluate_teacher(self) -> EvaluationResult:
        """Measure the teacher. It depends on no student, so it may run beside the training."""
        recipe = self.measures
        inputs = {"teacher": self.teacher_sha256, "recipe": recipe.model_dump(mode="json")}
        identity = digest(inputs | {"reference": self.reference.sha256})
        folder = self.out / "teacher"
        path = folder / "evaluation.json"
        if not self._done(folder, identity):
            self._claim(folder, identity)
            by_teacher = teacher_images(self.teacher, recipe.teacher_steps, recipe.teacher_guidance)
            self._measure("teacher", by_teacher, path, {})
            self._finish(folder, identity)
        return EvaluationResult.model_validate_json(path.read_text())

    def export(self) -> list[Parity]:
        """Export the student as a verified bundle; the parity gate must pass. [] where the bundle is there already."""
        _, comparison = self.evaluate()
        return self.ranks.first(lambda: self._export(comparison))

    def _export(self, comparison: Comparison | None) -> list[Parity]:
        recipe = self.recipe
        metrics: dict[str, float] = {}
        if comparison is not None:
            for name, estimate in comparison:
                if estimate is not None:
                    metrics[f"{name}_of_teacher"] = estimate.value
        parents = {
            "teacher": self.teacher_sha256,
            "recipe": recipe.sha256(),
            "pairs": hash_file(self.out / "pairs" / "index.jsonl"),
            "adp": hash_file(self.out / "adp" / STUDENT),
            "adm": hash_file(self.out / "adm" / STUDENT),
        }
        if recipe.regression is not None:
            parents["regression"] = hash_file(self.out / "regression" / STUDENT)
        folder = self.bundle_folder
        if folder.exists():
            if open_bundle(folder, verify=True).manifest.parents == parents:
                return []
            raise BundleError(
                f"{folder}: expected no bundle of other parents; give the recipe another version, or --out"
            )
        return export_bundle(
            folder,
            self.teacher,
            self.student,
            name=recipe.name,
            version=recipe.version,
            time_steps=recipe.time_steps,
            guidance=recipe.adm.guidance,
            max_batch=recipe.export.max_batch,
            parents=parents,
            metrics=metrics,
            licence=recipe.export.licence,
            attribution=recipe.export.attribution,
            tolerance=recipe.export.tolerance,
        )

    @property
    def bundle_folder(self) -> Path:
        """Where the bundle is put."""
        return self.out / "bundle" / self.recipe.name / str(self.recipe.version)

    @property
    def student(self) -> EmojiDenoiser:
        """The averaged student of ADM, as it is exported: in float16's precision."""
        values = load_file(self.out / "adm" / STUDENT)
        return student_of(self.teacher, {name: value.half().float() for name, value in values.items()})

    def _train(
        self,
        stage: str,
        identity: str,
        build: Callable[[], Method],
        steps: int,
        ema: float,
        average_from: int,
    ) -> str:
        folder = self.out / stage
        if self._done(folder, identity):
            return identity
        self._claim(folder, identity)
        averages: dict[str, Tensor] = train(
            build(),
            folder,
            stage=stage,
            steps=steps,
            ema=ema,
            identity=identity,
            average_from=average_from,
            report=self.progress,
            ranks=self.ranks,
        )
        if self.ranks.is_first:
            save_file({name: value.contiguous() for name, value in averages.items()}, folder / STUDENT)
        return self._finish(folder, identity)

    def _measure(
        self, name: str, generate: Generate, path: Path, made_by: dict[str, str]
    ) -> EvaluationResult:
        recipe, reference = self.measures, self.reference
        result = evaluate(
            generate,
            reference,
            reference_prompts(reference),
            range(recipe.first_seed, recipe.first_seed + recipe.num_seeds),
            num_components=recipe.num_components,
            provenance={
                "teacher": self.teacher_sha256,
                **made_by,
                "command": " ".join(["flashbulb", *sys.argv[1:]]),
                "commit": code_version(),
            },
            progress=lambda done, total: self.progress(f"evaluate {name}", done, total),
        )
        path.write_text(result.model_dump_json(indent=1) + "\n")
        return result

    def _grid(self, path: Path, prompts: tuple[Prompt, ...], by_student: Generate) -> None:
        """Forty prompts evenly through the list, unpicked seeds 0, 1, 2, ...: teacher beside student."""
        recipe = self.measures
        by_teacher = teacher_images(self.teacher, recipe.teacher_steps, recipe.teacher_guidance)
        spread = np.linspace(0, len(prompts) - 1, min(40, len(prompts))).astype(int)
        texts = [prompts[i].text for i in spread]
        seeds = list(range(len(texts)))
        rows = [
            ("teacher", list(by_teacher(texts, seeds))),
            ("student, one step", list(by_student(texts, seeds))),
        ]
        save_grid(rows, texts, path, max_columns=GRID_COLUMNS)

    # A stage's folder.

    def _done(self, folder: Path, identity: str) -> bool:
        return self.ranks.first(lambda: self._is_done(folder, identity))

    def _is_done(self, folder: Path, identity: str) -> bool:
        path = folder / "stage.json"
        if not path.exists():
            return False
        found = json.loads(path.read_text())
        if found["identity"] != identity:
            keys = differing_keys(found.get("recipe", {}), self.recipe.model_dump(mode="json"))
            what = f"a recipe with other {', '.join(keys)}" if keys else "another teacher or other data"
            raise RecipeError(
                f"{folder}: was made from {what}; choose another --out, or delete this folder and those after it"
            )
        return bool(found["done"])

    def _claim(self, folder: Path, identity: str) -> None:
        self.ranks.first(lambda: self._write(folder, identity, done=False))

    def _finish(self, folder: Path, identity: str) -> str:
        self.ranks.first(lambda: self._write(folder, identity, done=True))
        return identity

    def _write(self, folder: Path, identity: str, *, done: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".stage.json.tmp"
        record = {"identity": identity, "done": done, "recipe": self.recipe.model_dump(mode="json")}
        temporary.write_text(json.dumps(record) + "\n")
        temporary.replace(folder / "stage.json")


def differing_keys(old: Mapping[str, object], new: Mapping[str, object], prefix: str = "") -> list[str]:
    """Return the keys, written like adm.steps, in which two recipes differ."""
    keys: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(prefix + key)
    return keys


def code_version() -> str:
    """Return the commit that this code was run from, "-dirty" if it was changed; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def start_run(
    recipe: Recipe, out: Path, *, resume: bool, ranks: Ranks = ALONE, device: torch.device = CPU
) -> Run:
    """Prepare a run's folder and write what is needed to repeat the run.

    Raises:
        RecipeError: the folder holds a run and `resume` was not asked for.
    """
    ranks.first(lambda: _prepare(recipe, out, resume=resume))
    torch.manual_seed(recipe.seed)
    return Run(recipe, out, Progress(), ranks, device)


def _prepare(recipe: Recipe, out: Path, *, resume: bool) -> None:
    if out.exists() and any(out.iterdir()) and not resume:
        raise RecipeError(
            f"{out}: expected a new folder, found files; pass --resume to go on, or another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    versions = {name: version_of(name) for name in ("flashbulb", "torch", "diffusers", "numpy")}
    record = {
        "recipe": recipe.model_dump(mode="json"),
        "sha256": recipe.sha256(),
        "commit": code_version(),
        "python": platform.python_version(),
        "versions": versions,
    }
    (out / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
