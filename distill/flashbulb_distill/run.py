"""From teacher to verified bundle: pairs -> regression -> adp -> adm -> evaluate -> export, hashed and restartable.

    <out>/recipe.json           the resolved recipe, code and versions that the newest of pairs and training began with
    <out>/doctor.json           what the doctor found before the first step
    <out>/embeddings/           of prompts, where a family's text encoders are large
    <out>/pairs/                index.jsonl, shards
    <out>/regression/, <out>/adp/, <out>/adm/
                                metrics.jsonl, guard.json, checkpoint-*.safetensors, student.safetensors,
                                samples/ of the demo families: what the guard's probe drew
    <out>/teacher/              evaluation.json: the teacher's own figures
    <out>/evaluation/           teacher.json, student.json, table.md, grid.png
    <out>/bundle/<name>/<version>/
    <out>/report.html           all of it on one page

A recipe says which of the training stages there are. A stage that is done leaves stage.json with the hash of all that
it was made from; it runs again only if that changed. Pairs and training run on all ranks and their devices;
evaluation and export on the first rank's CPU.
"""

import json
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from .board import Board
from .bundle import BundleError, hash_file, open_bundle
from .core.draws import Draws
from .doctor.examine import Record, examine
from .doctor.subject import subject_of
from .evaluate.grid import save_grid
from .export.generate import Generate, student_images, teacher_images, to_images
from .export.parity import Parity
from .export.run import export_run
from .measure import Measurement, measurement_of
from .networks.lora import diffusers_names
from .pairs.generate import generate_pairs
from .pairs.growing import JOURNAL, GrowingPairs
from .pairs.lock import is_written, only_writer
from .pairs.store import DrawnPairs, count_pairs, read_pairs
from .progress import Progress
from .provenance import code_version
from .ranks import ALONE, Ranks
from .report.write import write_report
from .stage import StageFolder, is_finished
from .teachers.denoiser import Condition, Denoiser
from .teachers.emoji import is_code
from .teachers.open import open_teacher
from .teachers.pretrained import PretrainedTeacher
from .teachers.teacher import Teacher
from .train.build import Inputs, build, check_here, check_stages, student_of
from .train.checkpoint import read_module
from .train.guard import Guard, load_bands
from .train.probe import Probe, evenly
from .train.recipe import WITH_FAKE, PairsRecipe, Recipe, RecipeError, digest
from .train.trainer import train
from .train.variety import Variants, load_variants

STUDENT = "student.safetensors"
LORA = "pytorch_lora_weights.safetensors"
BEFORE_A_RUN = {"doctor.json", "embeddings"}  # what the doctor leaves in a new run's folder
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """One run of a recipe in its folder. Inputs are loaded when a stage first needs them."""

    recipe: Recipe
    out: Path
    progress: Progress
    ranks: Ranks = ALONE
    device: torch.device = CPU
    board: Board | None = None

    # Inputs.

    @cached_property
    def teacher(self) -> Teacher:
        """The frozen teacher on the CPU."""
        return self._open(CPU)

    @cached_property
    def trained_teacher(self) -> Teacher:
        """The frozen teacher on the device of the training, which may share it out over the ranks."""
        return self.teacher if self.device == CPU and not self._shares else self._open(self.device)

    @cached_property
    def _checked(self) -> None:
        """Check once that every stage could be trained."""
        check_stages(self.recipe, self.trained_teacher)
        if self.recipe.variety is not None:
            _ = self._texts

    @property
    def _shares(self) -> bool:
        """Tell whether training shares out networks: then no rank can use them alone."""
        return self.recipe.memory.sharding == "fsdp" and self.ranks.count > 1

    def _open(self, device: torch.device) -> Teacher:
        recipe = self.recipe
        return open_teacher(
            recipe.family,
            recipe.teacher,
            shape=recipe.shape,
            bf16=recipe.precision == "bfloat16",
            variant=recipe.variant,
            revision=recipe.revision,
            loras=recipe.loras,
            device=device,
            embeddings=self.out / "embeddings",
            progress=lambda done, total: self.progress("embeddings", done, total),
        )

    @cached_property
    def start(self) -> Teacher | None:
        """The student that the first stage goes on from, on the CPU; its folder opens as a teacher's does.

        Raises:
            RecipeError: there is none, or its network is not the teacher's.
        """
        recipe = self.recipe
        if recipe.start is None:
            return None
        wanted = f"start: expected the folder of a student of {recipe.teacher}, got {recipe.start}"
        try:
            start = open_teacher(recipe.family, recipe.start, shape=recipe.shape)
        except (OSError, ValueError, RuntimeError) as error:
            raise RecipeError(f"{wanted}: {str(error).partition('. ')[0]}") from error
        shapes = {name: p.shape for name, p in self.teacher.denoiser.named_parameters()}
        own = {
            name: p.shape
            for name, p in start.denoiser.named_parameters()
            if name in shapes or not is_code(name)  # a code of its own is kept
        }
        if shapes != own:
            raise RecipeError(f"{wanted}, a network of other parameters")
        return start

    @cached_property
    def teacher_sha256(self) -> str:
        """The hash of the teacher's weight files."""
        return digest(self.teacher.sha256())

    @cached_property
    def start_sha256(self) -> str | None:
        """The hash of the files of the student to go on from."""
        return digest(self.start.sha256()) if self.start else None

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
        teacher = self.trained_teacher
        if isinstance(teacher, PretrainedTeacher):
            self.ranks.first(lambda: len(teacher.encode(self.prompts)))  # the others read what it kept
        return teacher.encode(self.prompts)

    @cached_property
    def uncond(self) -> Condition:
        """The row that stands for no prompt."""
        teacher = self.trained_teacher
        if isinstance(teacher, PretrainedTeacher):
            self.ranks.first(lambda: len(teacher.encode_uncond()))
        return teacher.encode_uncond().to(self.device)

    @cached_property
    def measurement(self) -> Measurement[Any]:
        """The recipe's evaluation.

        Raises:
            RecipeError: the recipe has none.
        """
        recipe = self.recipe
        return measurement_of(recipe.measures, is_video=recipe.is_video, progress=self.progress)

    def doctor(self, *, again: bool = True) -> Record:
        """Examine the teacher as the training would use it, and write doctor.json; a line for each check on stderr.

        Args:
            again: also where the same teacher and recipe were found fit before.
        Raises:
            RecipeError: as `start`.
        """
        _ = self.start  # compared with the teacher, whose layers an adapter of the doctor's renames
        return self.ranks.first(lambda: self._doctor(again=again))

    def _doctor(self, *, again: bool) -> Record:
        path = self.out / "doctor.json"
        identity = digest({"teacher": self.teacher_sha256, "recipe": self.recipe.sha256()})
        if not again and path.exists():
            record = Record.model_validate_json(path.read_text())
            if record.identity == identity and record.is_fit:
                return record
        findings = []
        for finding in examine(subject_of(self.recipe, self.trained_teacher, self.prompts)):
            print(finding.line(), file=sys.stderr, flush=True)
            findings.append(finding)
        record = Record(identity=identity, findings=tuple(findings))
        path.write_text(record.model_dump_json(indent=1) + "\n")
        return record

    # Stages. Each returns its identity: the hash of all that it is made from.

    def pairs(self) -> str:
        """Make the teacher's ODE pairs; wait where another process makes them, and go on where it ended."""
        recipe, folder = self._pairs_recipe(), self._pairs_folder()
        if self.ranks.first(folder.is_done):
            return folder.identity
        with ExitStack() as held:
            self.ranks.first(lambda: held.enter_context(only_writer(folder.path, _say_that_we_wait)))
            if self._begins(folder):
                self._make_pairs(recipe, folder.path)
                self.ranks.first(folder.finish)
        return folder.identity

    def _first_pairs(self) -> str:
        """Return when as many pairs are there as training begins with, which another process makes; else make all."""
        recipe, folder = self._pairs_recipe(), self._pairs_folder()
        if recipe.start_after is None:
            return self.pairs()
        least = recipe.start_after

        def wait() -> bool:
            while not folder.is_done() and is_written(folder.path):
                if count_pairs(folder.path) >= least:
                    return True
                time.sleep(1.0)
            return False

        return folder.identity if self.ranks.first(wait) else self.pairs()

    def _pairs_recipe(self) -> PairsRecipe:
        if self.recipe.pairs is None:
            raise RecipeError("pairs: expected a section that says which pairs to make, got null")
        return self.recipe.pairs

    def _pairs_folder(self) -> StageFolder:
        """Return the folder of the pairs, whose identity does not depend on when training begins."""
        recipe = self.recipe
        made = self._pairs_recipe().model_dump(exclude={"start_after"})
        inputs = {"teacher": self.teacher_sha256, "prompts": digest(self.prompts), "seed": recipe.seed}
        drawn = {"precision": recipe.precision, "shape": _said(recipe.shape)}
        return self._folder("pairs", digest(inputs | drawn | {"recipe": made}))

    def _drawn_pairs(self, stage: Path) -> DrawnPairs | None:
        """Return the pairs that a stage learns from, in whose folder a journal says what was known when."""
        recipe, folder = self.recipe.pairs, self.out / "pairs"
        if recipe is None:
            return None
        if recipe.start_after is None:
            return read_pairs(folder)
        return GrowingPairs(folder, stage / JOURNAL, recipe.count, ranks=self.ranks)

    def _make_pairs(self, pairs: PairsRecipe, folder: Path) -> None:
        generate_pairs(
            folder,
            self.trained_teacher.denoiser,
            self.prompts,
            self.condition,
            self.uncond,
            latent_shape=self.teacher.latent_shape,
            count=pairs.count,
            num_steps=pairs.num_steps,
            guidance=pairs.guidance,
            order=pairs.order,
            draws=Draws(self.recipe.seed),
            batch_size=pairs.batch_size,
            ranks=self.ranks,
            progress=lambda done, total: self.progress("pairs", done, total),
        )

    def train(self, stage: str) -> str:
        """Train the stages up to `stage`, each from the student of the one before.

        Raises:
            RecipeError: the recipe has no such stage, or one of them could not be trained here.
        """
        stages = list(self.recipe.stages)
        if stage not in stages:
            raise RecipeError(f"{stage}: expected a section of that name, the recipe has {', '.join(stages)}")
        wanted = stages[: stages.index(stage) + 1]
        # A stage that was finished from something else is refused when its turn comes.
        ahead = self.ranks.first(lambda: [name for name in wanted if not is_finished(self.out / name)])
        if ahead:
            check_here(self.recipe, self.trained_teacher, self.ranks, ahead)
        return self._train(stage)

    def _train(self, stage: str) -> str:
        stages = self.recipe.stages
        place = list(stages).index(stage)
        parent = list(stages)[place - 1] if place else None
        made_of = self._train(parent) if parent else self._source()
        inputs = {"parent": made_of, "time_steps": self.recipe.time_steps, "seed": self.recipe.seed}
        inputs |= self.networks(stage)
        section = stages[stage]
        inputs |= {"variety": digest(self._texts)} if stage == "variety" else {}
        inputs |= {"guard": self.recipe.guard.model_dump(mode="json")} if self.recipe.guard else {}
        folder = self._folder(stage, digest(inputs | {"recipe": section.model_dump(mode="json")}))
        if not self._begins(folder):
            return folder.identity
        method = build(
            stage,
            Inputs(
                recipe=self.recipe,
                teacher=self.trained_teacher,
                cond=self.condition,
                uncond=self.uncond,
                pairs=self._drawn_pairs(folder.path),
                start=load_file(self.out / parent / STUDENT) if parent else self._start_values(),
                heads=self._carried_heads(stage),
                variants=self._variants(stage),
                ranks=self.ranks,
            ),
        )
        averages: dict[str, Tensor] = train(
            method,
            folder.path,
            stage=stage,
            steps=section.steps,
            ema=section.ema,
            identity=folder.identity,
            average_from=section.average_from,
            rate_at=section.rate_at,
            save_every=self.recipe.checkpoint_every,
            report=self._logged,
            ranks=self.ranks,
            guard=self._guard(stage),
        )
        if self.ranks.is_first:
            save_file({name: value.contiguous() for name, value in averages.items()}, folder.path / STUDENT)
            self._save_lora(folder.path, averages)
        self.ranks.first(folder.finish)
        return folder.identity

    def networks(self, stage: str) -> dict[str, object]:
        """Return what the recipe says, outside the stage's own section, of the networks that a stage trains."""
        recipe = self.recipe
        roles = {"student": recipe.roles.student}
        if stage in WITH_FAKE:
            roles["fake"] = recipe.roles.fake
        lora = recipe.lora if "lora" in roles.values() else None
        return {
            "shape": _said(recipe.shape),
            "precision": recipe.precision,
            "roles": roles,
            "lora": _said(lora),
        }

    def _start_values(self) -> dict[str, Tensor] | None:
        return dict(self.start.denoiser.named_parameters()) if self.start else None

    def _logged(self, stage: str, step: int, steps: int, logs: dict[str, float]) -> None:
        self.progress(stage, step, steps, logs)
        if self.board is not None:
            self.board.write(stage, step, logs)

    def _show(self, stage: str, prompts: list[str], step: int, samples: Tensor) -> None:
        """Keep what the guard's probe drew, pixels [prompts, seeds, 3, h, w]; latents and clips are no pictures."""
        if not self.recipe.is_demo or self.recipe.is_video:
            return
        folder = self.out / stage / "samples"
        folder.mkdir(exist_ok=True)
        rows = [(f"seed {seed}", list(to_images(samples[:, seed]))) for seed in range(samples.shape[1])]
        save_grid(rows, prompts, folder / f"{step:08d}.png")
        if self.board is not None:
            self.board.picture(stage, step, folder / f"{step:08d}.png")

    def _guard(self, stage: str) -> Guard | None:
        """Return what watches over a stage, with a few of the training prompts."""
        recipe = self.recipe.guard
        if recipe is None:
            return None
        rows = evenly(self.prompts, recipe.prompts)
        probe = Probe(
            teacher=self.trained_teacher.denoiser,
            cond=self.condition.take(torch.tensor(rows)).to(self.device),
            uncond=self.uncond,
            latent_shape=self.teacher.latent_shape,
            time_steps=self.recipe.time_steps,
            guidance=self.recipe.guidance,
            draws=Draws(self.recipe.seed),
            seeds=recipe.seeds,
            # Large VAEs stay off the training's device: latents are compared as they are.
            decode=self.trained_teacher.codec.decode if self.recipe.is_demo else None,
            show=partial(self._show, stage, [self.prompts[row] for row in rows]),
            ranks=self.ranks,
        )
        return Guard(recipe, load_bands(recipe.bands, stage), probe)

    def _save_lora(self, folder: Path, averages: Mapping[str, Tensor]) -> None:
        """Write a student that is an adapter as the file that diffusers' `load_lora_weights` reads."""
        recipe = self.recipe
        if recipe.roles.student == "lora":
            named = diffusers_names(averages, rank=recipe.lora.rank, alpha=recipe.lora.alpha)
            save_file({name: value.contiguous() for name, value in named.items()}, folder / LORA)

    def _source(self) -> str:
        """Return the identity of what the first stage begins from."""
        start = self.start_sha256  # a wrong one is refused before hours of pairs
        made_of = self._data()
        return digest({"data": made_of, "start": start}) if start else made_of

    def _data(self) -> str:
        """Return the identity of what the first stage learns from."""
        if self.recipe.pairs:
            made_of = self._first_pairs()
            least = self.recipe.pairs.start_after
            return made_of if least is None else digest({"pairs": made_of, "start_after": least})
        return digest({"teacher": self.teacher_sha256, "prompts": digest(self.prompts)})

    def _carried_heads(self, stage: str) -> dict[str, Tensor] | None:
        """Return ADP's latent heads where this stage starts from them."""
        adm = self.recipe.adm
        if stage != "adm" or adm is None or not adm.carry_heads:
            return None
        return read_module(self.out / "adp", "latent")

    def _variants(self, stage: str) -> Variants | None:
        """Return what each training prompt may stand for, where a stage wants to know it."""
        if stage != "variety":
            return None
        every = list(dict.fromkeys(text for texts in self._texts for text in texts))
        place = {text: row for row, text in enumerate(every)}
        return Variants(
            self.trained_teacher.encode(every), [[place[text] for text in texts] for texts in self._texts]
        )

    @cached_property
    def _texts(self) -> list[list[str]]:
        """The variants of each training prompt; a prompt without any is its own."""
        assert self.recipe.variety is not None
        table = load_variants(self.recipe.variety.variants, self.prompts)
        return [table.get(prompt, [prompt]) for prompt in self.prompts]

    def regression(self) -> str:
        """Train up to the regression on the pairs."""
        return self.train("regression")

    def adp(self) -> str:
        """Train up to ADP."""
        return self.train("adp")

    def adm(self) -> str:
        """Train up to ADM."""
        return self.train("adm")

    def dmd(self) -> str:
        """Train up to DMD, or DMD2."""
        return self.train("dmd")

    def ladd(self) -> str:
        """Train up to LADD."""
        return self.train("ladd")

    def lcm(self) -> str:
        """Train up to LCM."""
        return self.train("lcm")

    def variety(self) -> str:
        """Train up to the variety of prompts."""
        return self.train("variety")

    def evaluate(self) -> tuple[str, dict[str, float]]:
        """Measure the student beside its teacher, on seeds that training never used.

        Returns:
            the stage's identity, and the student's figures as shares of the teacher's.
        """
        if self.recipe.evaluate is None:
            return self.train(self.recipe.last_stage), {}
        self.ranks.first(lambda: self.measurement.reference_sha256)  # a wrong one is refused before all of it
        parent = self.train(self.recipe.last_stage)
        return self.ranks.first(lambda: self._evaluate(parent))

    def _evaluate(self, parent: str) -> tuple[str, dict[str, float]]:
        measurement, teacher, recipe = self.measurement, self.evaluate_teacher(), self.recipe
        folder = self._folder("evaluation", self.evaluation_of({"student": parent}))
        path = folder.path
        if not folder.is_done():
            folder.claim()
            by_student = student_images(self.teacher, self.student, recipe.time_steps)
            made_by = {"teacher": self.teacher_sha256, "recipe": recipe.sha256()}
            student = measurement.measure("student", by_student, made_by)
            for name, result in (("student", student), ("teacher", teacher)):
                (path / f"{name}.json").write_text(result.model_dump_json(indent=1) + "\n")
            (path / "table.md").write_text(measurement.table(student, teacher))
            steps = len(recipe.time_steps)
            rows = {
                "teacher": self._by_teacher(),
                f"student, {steps} step{'s' if steps > 1 else ''}": by_student,
            }
            measurement.save_grid(path / "grid.png", rows)
            folder.finish()
        return folder.identity, measurement.shares(measurement.read(path / "student.json"), teacher)

    def evaluate_teacher(self) -> BaseModel:
        """Measure the teacher. It depends on no student, so it may run beside the training."""
        measurement = self.measurement
        folder = self._folder("teacher", self.evaluation_of({"teacher": self.teacher_sha256}))
        path = folder.path / "evaluation.json"
        if not folder.is_done():
            folder.claim()
            result = measurement.measure("teacher", self._by_teacher(), {"teacher": self.teacher_sha256})
            path.write_text(result.model_dump_json(indent=1) + "\n")
            folder.finish()
        found: BaseModel = measurement.read(path)
        return found

    def evaluation_of(self, made_of: dict[str, str]) -> str:
        """Return the identity of the evaluation of something."""
        measured = {"reference": self.measurement.reference_sha256}
        return digest(made_of | measured | {"recipe": self.recipe.measures.model_dump(mode="json")})

    def _by_teacher(self) -> Generate:
        recipe = self.recipe.measures
        return teacher_images(self.teacher, recipe.teacher_steps, recipe.teacher_guidance)

    def export(self) -> list[Parity]:
        """Export the student as a verified bundle; the parity gate must pass. [] where the bundle is there already."""
        _, shares = self.evaluate()
        if self.recipe.pairs:
            self.pairs()  # all of them: the bundle names its parents by hash
        return self.ranks.first(lambda: self._export(shares))

    def _export(self, shares: Mapping[str, float]) -> list[Parity]:
        metrics = {f"{name}_of_teacher": value for name, value in shares.items()}
        parents = {"teacher": self.teacher_sha256, "recipe": self.recipe.sha256()}
        if self.recipe.pairs:
            parents["pairs"] = hash_file(self.out / "pairs" / "index.jsonl")
        if self.start_sha256:
            parents["start"] = self.start_sha256
        parents |= {stage: hash_file(self.out / stage / STUDENT) for stage in self.recipe.stages}
        folder = self.bundle_folder
        if folder.exists():
            if open_bundle(folder, verify=True).manifest.parents == parents:
                return []
            raise BundleError(
                f"{folder}: expected no bundle of other parents; give the recipe another version, or --out"
            )
        return export_run(folder, self.recipe, self.teacher, self.student, parents=parents, metrics=metrics)

    def report(self) -> Path:
        """Write report.html of what is done: pictures, figures, cost, health, recipe and hashes.

        Raises:
            RecipeError: the last training stage is not done.
        """
        if not (self.out / self.recipe.last_stage / STUDENT).is_file():
            raise RecipeError(
                f"{self.out}: expected a run whose stage {self.recipe.last_stage} is done; run it first"
            )
        return self.ranks.first(
            lambda: write_report(
                self.out,
                self.recipe,
                self._open(self.device) if self._shares else self.trained_teacher,
                self.prompts,
                self.bundle_folder,
                lambda done, total: self.progress("report", done, total),
            )
        )

    @property
    def bundle_folder(self) -> Path:
        """Where the bundle is put."""
        return self.out / "bundle" / self.recipe.name / str(self.recipe.version)

    @property
    def student(self) -> Denoiser:
        """The averaged student of the last stage, as it is exported: the demo families' in float16's precision."""
        values = load_file(self.out / self.recipe.last_stage / STUDENT)
        student = student_of(self.teacher, values, self.recipe)
        if self.recipe.is_demo:
            for parameter in student.parameters():
                parameter.copy_(parameter.half())
        return student

    def _write_record(self) -> None:
        """Write what is needed to repeat what begins now."""
        versions = {name: version_of(name) for name in ("flashbulb", "torch", "diffusers", "numpy")}
        record = {
            "recipe": self.recipe.model_dump(mode="json"),
            "sha256": self.recipe.sha256(),
            "commit": code_version(),
            "python": platform.python_version(),
            "versions": versions,
        }
        temporary = self.out / ".recipe.json.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(self.out / "recipe.json")

    # A stage's folder.

    def _folder(self, name: str, identity: str) -> StageFolder:
        return StageFolder(self.out / name, identity, self.recipe)

    def _begins(self, folder: StageFolder) -> bool:
        """Claim a stage's folder; False where the stage is done. All processes get the same answer.

        Raises:
            RecipeError: a stage of the recipe, not only this one, could not be trained.
        """
        if self.ranks.first(folder.is_done):
            return False
        _ = self._checked

        def claim() -> None:
            if not folder.has_begun():
                self._write_record()
            folder.claim()

        self.ranks.first(claim)
        return True


def start_run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool,
    ranks: Ranks = ALONE,
    device: torch.device = CPU,
    tensorboard: bool = False,
) -> Run:
    """Prepare a run's folder.

    Args:
        tensorboard: write logged scalars for it too, under <out>/tensorboard.
    Raises:
        RecipeError: the folder holds a run and `resume` was not asked for.
    """
    board = Board(out / "tensorboard") if tensorboard and ranks.is_first else None
    ranks.first(lambda: _prepare(out, resume=resume))
    torch.manual_seed(recipe.seed)
    return Run(recipe, out, Progress(), ranks, device, board)


def _say_that_we_wait() -> None:
    print("pairs: another process is making them; waiting for it", file=sys.stderr, flush=True)


def _prepare(out: Path, *, resume: bool) -> None:
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    if found - BEFORE_A_RUN and not resume:
        raise RecipeError(
            f"{out}: expected a new folder, found files; pass --resume to go on, or another --out"
        )
    out.mkdir(parents=True, exist_ok=True)


def _said(part: BaseModel | None) -> object:
    return part and part.model_dump(mode="json")
