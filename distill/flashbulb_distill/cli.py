"""flashbulb distill: from a teacher to a verified bundle."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .run import Run

app = typer.Typer(
    help="Distil a diffusion teacher into a one-step or few-step student.", no_args_is_help=True
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
    epilog="Examples:  flashbulb distill run distill/recipes/emoji.yaml  |  "
    "flashbulb distill run my.yaml --set adm.steps=100 --out runs/try --resume  |  "
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
) -> None:
    """Run the recipe's stages: doctor, pairs, regression, adp, adm, evaluate, export with its parity gate."""
    with _started(recipe, set_, out, resume=resume, device=device) as started:
        if not no_doctor:
            _examine(started, again=False)
        parity = started.export()
    if not started.ranks.is_first:
        return
    loaded = started.recipe
    table = started.out / "evaluation" / "table.md"
    if table.exists():
        print(table.read_text())
    for entry in parity:
        print(f"parity {entry.component}: {entry.error:.2e} of at most {entry.tolerance:.0e}")
    print(f"bundle: {started.bundle_folder}")
    print(
        f"serve it: copy it to models/{loaded.name}/{loaded.version} and run flashbulb serve", file=sys.stderr
    )


@contextmanager
def _started(
    recipe: Path, overrides: list[str] | None, out: Path | None, *, resume: bool, device: str
) -> Iterator["Run"]:
    """Join the other processes, if torchrun started several, and prepare the run."""
    from .ranks import joined, own_device
    from .run import start_run
    from .train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    where = own_device(device)
    folder = out or Path("runs") / loaded.name
    with joined(where) as ranks:
        yield start_run(loaded, folder, resume=resume, ranks=ranks, device=where)


@app.command(
    epilog="Examples:  flashbulb distill doctor distill/recipes/emoji.yaml  |  "
    "flashbulb distill doctor my.yaml --set precision=float32 --device cuda"
)
def doctor(recipe: RecipePath, set_: Overrides = None, out: Out = None, device: Device = "auto") -> None:
    """Examine a recipe's teacher as training would use it: a line for each check, exit code 1 on a fault."""
    with _started(recipe, set_, out, resume=True, device=device) as started:
        _examine(started, again=True)
    if started.ranks.is_first:
        print(f"doctor: fit, see {started.out / 'doctor.json'}")


def _examine(started: "Run", *, again: bool) -> None:
    from .doctor.examine import Unfit

    record = started.doctor(again=again)
    if not record.is_fit:
        raise Unfit(record.findings)


def _stage(name: str, text: str) -> None:
    def command(recipe: RecipePath, set_: Overrides = None, out: Out = None, device: Device = "auto") -> None:
        with _started(recipe, set_, out, resume=True, device=device) as started:
            getattr(started, name)()
        if started.ranks.is_first:
            print(f"{name}: done, in {started.out}")

    command.__doc__ = text
    app.command(name.replace("_", "-"))(command)


for _name in ("pairs", "regression", "adp", "adm", "dmd", "ladd", "lcm", "evaluate", "export"):
    _stage(_name, f"Run the stages up to {_name}; those that are done are not repeated.")
_stage("evaluate_teacher", "Measure the teacher alone, as `evaluate` would: it may run beside the training.")
