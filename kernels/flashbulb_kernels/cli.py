"""flashbulb kernels: verify and measure the Triton kernels."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

app = typer.Typer(help="Verify and measure the Triton kernels.", no_args_is_help=True)

GPU = "cuda"
DTYPES = ("fp16", "bf16", "fp32")
DType = Annotated[str, typer.Option("--dtype", help=f"one of {', '.join(DTYPES)}")]


@app.callback()
def kernels() -> None:
    """Verify and measure the Triton kernels."""


@app.command(
    epilog="Examples:  flashbulb kernels verify  |  TRITON_INTERPRET=1 flashbulb kernels verify --dtype bf16"
)
def verify(dtype: DType = "all") -> None:
    """Compare the kernels with their definition on this machine: values and gradients."""
    import torch

    device = torch.device(GPU if torch.cuda.is_available() else "cpu")
    _verify(device, _dtypes(DTYPES if dtype == "all" else (dtype,)), talk=True)


@app.command(
    epilog="Examples:  flashbulb kernels bench  |  flashbulb kernels bench --family sd35,cogvideox --dtype fp16 "
    "--batch 2 --out times.json"
)
def bench(
    dtype: DType = "bf16",
    family: Annotated[str, typer.Option("--family", help="sdxl, sd3, sd35, cogvideox, or several")] = "all",
    batch: Annotated[int, typer.Option("--batch", min=1, max=1024, help="samples per call")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", help="write machine, versions and rows here, as JSON")
    ] = None,
) -> None:
    """Time attention against torch's own on this GPU, after the kernels have proved right on it."""
    import torch

    from . import bench as benchmark
    from .errors import KernelUnavailable

    (chosen,) = _dtypes((dtype,))
    layers = [layer for layer in benchmark.LAYERS if layer.family in _families(family, benchmark.FAMILIES)]
    if not torch.cuda.is_available():
        raise KernelUnavailable(
            f"expected a CUDA device to measure on, found none (torch {torch.__version__}); the kernels can be "
            "verified without one: TRITON_INTERPRET=1 flashbulb kernels verify"
        )
    device = torch.device(GPU)
    _verify(device, [chosen], talk=False)
    rows = []
    for row in benchmark.bench(layers, batch=batch, dtype=chosen, device=device, timer=benchmark.gpu_timer):
        rows.append(row)
        typer.echo(f"{row.family} {row.layer} {row.work}: {row.ours_ms[0]:.3f} ms", err=True)
    typer.echo(benchmark.table(rows))
    if out is not None:
        told = benchmark.report(rows, batch=batch, dtype=chosen, device=device)
        out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _verify(device: "torch.device", dtypes: "list[torch.dtype]", *, talk: bool) -> None:
    """Run the comparison and raise KernelError unless every case is right."""
    from . import verify as verification
    from .errors import KernelError

    listed = verification.cases(dtypes)
    wrong = []
    for verdict in verification.verify(device, listed):
        if talk or not verdict.ok:
            typer.echo(f"{'ok   ' if verdict.ok else 'WRONG'} {verdict}", err=not talk)
        if not verdict.ok:
            wrong.append(verdict)
    if wrong:
        raise KernelError(
            f"expected {len(listed)} right cases, got {len(wrong)} wrong ones, the first: {wrong[0]}"
        )
    typer.echo(f"kernels: {len(listed)} cases right on {device.type}", err=True)


def _dtypes(names: tuple[str, ...]) -> "list[torch.dtype]":
    from .attention.availability import DTYPES as KNOWN

    by_name = {name: dtype for dtype, name in KNOWN.items()}
    for name in names:
        if name not in by_name:
            raise typer.BadParameter(f"--dtype: expected one of {', '.join(by_name)}, got {name!r}")
    return [by_name[name] for name in names]


def _families(given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if given == "all":
        return known
    names = tuple(name.strip() for name in given.split(","))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"--family: expected some of {', '.join(known)}, got {name!r}")
    return names
