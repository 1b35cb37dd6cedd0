"""flashbulb distill: from a teacher to a verified bundle."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .run import Run

app = typer.Typer(
    help="Distil a diffusion teacher into a one-step or few-step student.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="a YAML recipe, like distill/recipes/emoji.yaml")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override one value of the recipe, like --set adm.steps=100")
]
Out = Annotated[Path | None, typer.Option("--out", help="the run's folder; runs/<name> by default")]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="what trains: auto, cpu, cuda or cuda:N; each process of torchrun has its own"
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in the folder")]


@app.callback()
def distill() -> None:
    """Distil a diffusion teacher into a one-step or few-step student."""


@app.command(
    epilog="\b\nExamples:\n  flashbulb distill run distill/recipes/emoji.yaml\n  "
    "flashbulb distill run my.yaml --set adm.steps=100 --out runs/try --resume\n  "
    "torchrun --nproc-per-node=8 --no-python flashbulb distill run my.yaml --resume"
)
def run(
    recipe: RecipePath,
    set_: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    device: Device = "auto",
    no_doctor: Annotated[
        bool, typer.Option("--no-doctor", help="begin without examining the teacher first")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="write scalars for TensorBoard too, under <out>/tensorboard")
    ] = False,
) -> None:
    """Run the recipe's stages: doctor, pairs, regression, adp, adm, evaluate, export with its parity gate."""
    with _started(recipe, set_, out, resume=resume, device=device, tensorboard=tensorboard) as started:
        if not no_doctor:
            _examine(started, again=False)
        parity = started.export()
        report = started.report()
    if not started.ranks.is_first:
        return
    loaded = started.recipe
    table = started.out / "evaluation" / "table.md"
    if table.exists():
        print(table.read_text())
    for entry in parity:
        print(f"parity {entry.component}: {entry.error:.2e} of at most {entry.tolerance:.0e}")
    print(f"bundle: {started.bundle_folder}")
    print(f"report: {report}")
    print(
        f"serve it: copy it to models/{loaded.name}/{loaded.version} and run flashbulb serve", file=sys.stderr
    )


@contextmanager
def _started(
    recipe: Path,
    overrides: list[str] | None,
    out: Path | None,
    *,
    resume: bool,
    device: str,
    tensorboard: bool = False,
) -> Iterator["Run"]:
    """Join the other processes, if torchrun started several, and prepare the run."""
    from .ranks import joined, own_device
    from .run import start_run
    from .train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    where = own_device(device)
    folder = out or Path("runs") / loaded.name
    with joined(where) as ranks:
        yield start_run(loaded, folder, resume=resume, ranks=ranks, device=where, tensorboard=tensorboard)


@app.command(
    epilog="\b\nExamples:\n  flashbulb distill doctor distill/recipes/emoji.yaml\n  "
    "flashbulb distill doctor my.yaml --set precision=float32 --device cuda"
)
def doctor(recipe: RecipePath, set_: Overrides = None, out: Out = None, device: Device = "auto") -> None:
    """Examine a recipe's teacher as training would use it: a line for each check, exit code 1 on a fault."""
    with _started(recipe, set_, out, resume=True, device=device) as started:
        _examine(started, again=True)
    if started.ranks.is_first:
        print(f"doctor: fit, see {started.out / 'doctor.json'}")


@app.command(
    epilog="\b\nExamples:\n  flashbulb distill plan distill/recipes/sdxl_1step.yaml --gpu 24GiB\n  "
    "flashbulb distill plan my.yaml --gpu 80GB --gpus 8 --stage adm --json"
)
def plan(
    recipe: RecipePath,
    gpu: Annotated[str, typer.Option("--gpu", metavar="SIZE", help="its memory, like 24GiB or 80GB")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="how many of them train together")] = 1,
    set_: Overrides = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", help="one training stage alone; all by default, with one pair of roles"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Predict memory and time of each training stage without loading a weight, and say which strategy fits a GPU."""
    from .plan.choose import plan_stages
    from .plan.predict import Prediction, predict
    from .plan.text import read_bytes, table
    from .train.recipe import Recipe, RecipeError, load_recipe

    loaded, size = load_recipe(recipe, set_ or ()), read_bytes(gpu)
    stages = [stage] if stage else list(loaded.stages)
    if unknown := [name for name in stages if name not in loaded.stages]:
        raise RecipeError(f"--stage: expected one of {', '.join(loaded.stages)}, got {unknown[0]}")

    def predicted(changed: Recipe, name: str, budget: int) -> Prediction:
        kinds, again = changed.roles, changed.memory.checkpointing
        print(
            f"{name}: student {kinds.student}, fake {kinds.fake}, checkpointing {'on' if again else 'off'}, "
            f"sharding {changed.memory.sharding}, {changed.stages[name].batch_size} rows ...",
            file=sys.stderr,
            flush=True,
        )
        return predict(changed, name, budget, gpus=gpus)

    plans = plan_stages(loaded, stages, size, predicted, gpus=gpus)
    if as_json:
        print(json.dumps([made.model_dump(mode="json") for made in plans], indent=1))
    else:
        print("\n\n".join(table(made) for made in plans))


@app.command(epilog="\b\nExample:\n  flashbulb distill report distill/recipes/emoji.yaml --out runs/emoji")
def report(recipe: RecipePath, set_: Overrides = None, out: Out = None, device: Device = "auto") -> None:
    """Write report.html of a run that is done: pictures, figures with intervals, cost, health, recipe, hashes."""
    with _started(recipe, set_, out, resume=True, device=device) as started:
        path = started.report()
    if started.ranks.is_first:
        print(path)


def _examine(started: "Run", *, again: bool) -> None:
    from .doctor.examine import Unfit

    record = started.doctor(again=again)
    if not record.is_fit:
        raise Unfit(record.findings)


@app.command(
    epilog="\b\nExamples:\n  flashbulb distill compare\n  flashbulb distill compare --methods A1,B4,DMD2 --seeds 5\n  "
    "flashbulb distill compare --on distill/recipes/emoji.yaml --moves 100 --seeds 1"
)
def compare(
    on: Annotated[
        Path | None, typer.Option("--on", metavar="RECIPE", help="race on this recipe's teacher instead")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="which, like A1,B4,DMD2; all by default")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="runs of each method")] = 3,
    moves: Annotated[int, typer.Option("--moves", min=2, help="updates of the student in each run")] = 1000,
    set_: Overrides = None,
    out: Out = None,
    device: Device = "auto",
) -> None:
    """Race the methods on one teacher: a mixture of Gaussians whose score is exact, or a recipe's own.

    A1 regression, A5 ADP, B1 ADM, B2 DMD, B3 ADP then DMD, B4 ADP then ADM (DMDX), B4h with ADP's heads, DMD2, LADD,
    LCM: the same start, pairs and number of student updates. Writes race.json, table.md and, of the mixture, a picture.
    """
    from .provenance import code_version
    from .race.entries import find_entries

    entries = find_entries(methods)
    made_by = {"command": " ".join(["flashbulb", *sys.argv[1:]]), "commit": code_version()}
    if on is not None:
        from .race.pictures import PictureRace

        with _started(on, set_, out, resume=True, device=device) as started:
            first = started.recipe.seed
            PictureRace(started, entries, range(first, first + seeds), moves)(made_by)
            table = started.out / "race" / "table.md"
    else:
        from .progress import Progress
        from .race.course import Course
        from .race.mixture import race_on_mixture

        folder = out or Path("runs/race")
        race_on_mixture(
            Course(moves=moves), entries, range(seeds), folder, provenance=made_by, report=Progress()
        )
        table = folder / "table.md"
    print(table.read_text())
    print(f"{table.parent}: table.md, race.json", file=sys.stderr)


def _stage(name: str, text: str) -> None:
    def command(recipe: RecipePath, set_: Overrides = None, out: Out = None, device: Device = "auto") -> None:
        with _started(recipe, set_, out, resume=True, device=device) as started:
            getattr(started, name)()
        if started.ranks.is_first:
            print(f"{name}: done, in {started.out}")

    command.__doc__ = text
    app.command(name.replace("_", "-"))(command)


for _name in ("pairs", "regression", "adp", "adm", "dmd", "ladd", "lcm", "variety", "evaluate", "export"):
    _stage(_name, f"Run the stages up to {_name}; those that are done are not repeated.")
_stage("evaluate_teacher", "Measure the teacher alone, as `evaluate` would: it may run beside the training.")
