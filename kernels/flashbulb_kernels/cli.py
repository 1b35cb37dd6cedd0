"""flashbulb kernels: compile, inspect, verify and measure the Triton kernels."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from .aot import Variant

app = typer.Typer(
    help="Compile, inspect, verify and measure the Triton kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

GPU = "cuda"
DTYPES = ("fp16", "bf16", "fp32")
Archs = Annotated[str, typer.Option("--arch", help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, or several")]
Entries = Annotated[str, typer.Option("--entry", help="forward, fused, delta, dkdv, dk, dv, dq, or several")]
DTypes = Annotated[str, typer.Option("--dtype", help="fp16, bf16, fp32, or several")]
HeadDims = Annotated[str, typer.Option("--head-dim", help="32, 40, 64, 80, 96, 128, 160, or several")]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", help="where compiled kernels are kept; ~/.cache/flashbulb/kernels by default"
    ),
]
Jobs = Annotated[int, typer.Option("--jobs", min=1, max=256, help="compilers at a time")]
DType = Annotated[str, typer.Option("--dtype", help=f"one of {', '.join(DTYPES)}")]


@app.callback()
def kernels() -> None:
    """Compile, inspect, verify and measure the Triton kernels."""


@app.command(
    epilog="\b\nExamples:\n  flashbulb kernels compile --arch sm_89\n  flashbulb kernels compile --arch sm_80,sm_90 "
    "--entry forward --dtype fp16 --head-dim 64 --cache-dir build/kernels"
)
def compile(
    arch: Archs = "all",
    entry: Entries = "all",
    dtype: DTypes = "all",
    head_dim: HeadDims = "all",
    cache_dir: Cache = None,
    jobs: Jobs = 2,
) -> None:
    """Compile the kernels to PTX and cubin, without a GPU; what is in the cache is not compiled again."""
    from .aot import Compiled, compile_variants, default_cache
    from .errors import CompilationFailed

    variants = _variants(arch, entry, dtype, head_dim)
    cache = cache_dir or default_cache()
    refused = []
    fresh = 0
    for done, (variant, result) in enumerate(compile_variants(variants, cache, jobs), 1):
        if isinstance(result, Compiled):
            fresh += not result.cached
            typer.echo(f"{done}/{len(variants)} {variant} {result.key}{' cached' * result.cached}", err=True)
        else:
            refused.append(result)
            typer.echo(f"{done}/{len(variants)} FAILED {result}", err=True)
    typer.echo(f"{len(variants)} variants in {cache}: {fresh} compiled, {len(refused)} failed")
    if refused:
        raise CompilationFailed(
            f"expected {len(variants)} variants to compile, {len(refused)} did not: {refused[0]}"
        )


@app.command(
    epilog="\b\nExamples:\n  flashbulb kernels inspect --arch sm_90 --entry forward --dtype fp16 --head-dim 64\n  "
    "flashbulb kernels inspect --check --write kernels/static-table.csv\n  flashbulb kernels inspect --roofline"
)
def inspect(
    arch: Archs = "all",
    entry: Entries = "all",
    dtype: DTypes = "all",
    head_dim: HeadDims = "all",
    cache_dir: Cache = None,
    jobs: Jobs = 2,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    check: Annotated[bool, typer.Option("--check", help="exit 1 if any kernel fails the gate")] = False,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write",
            help="bring this CSV up to date; its rows of kernels that have not changed are not made again",
        ),
    ] = None,
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline", help="print the bound that each GPU's datasheet puts on attention, and end"
        ),
    ] = False,
) -> None:
    """Show what the kernels compile to: registers, spills, shared memory, instructions, occupancy. No GPU, no times."""
    import tempfile
    from dataclasses import asdict

    from .aot import compile_variants, default_cache
    from .errors import GateFailed
    from .inspect import inspect as describe
    from .static_table import current, markdown, read_csv, replace_file, roofline_markdown, write_csv

    if roofline:
        typer.echo(roofline_markdown())
        return
    variants = _variants(arch, entry, dtype, head_dim)
    known = {}
    if write is not None and write.exists():
        known = {row.name: row for row in current(read_csv(write.read_text(encoding="utf-8")))}
        replace_file(write, write_csv(known.values()))  # without what is stale
    rows = [known[str(variant)] for variant in variants if str(variant) in known]
    missing = [variant for variant in variants if str(variant) not in known]
    if rows:
        typer.echo(f"{len(rows)} of {len(variants)} kernels are in {write} as they are", err=True)
    with tempfile.TemporaryDirectory(prefix="flashbulb-inspect-") as scratch:
        results = compile_variants(missing, cache_dir or default_cache(), jobs)
        for row in describe(results, Path(scratch), jobs):
            rows.append(row)
            typer.echo(f"{len(rows)}/{len(variants)} {row.name}: {'; '.join(row.faults) or 'ok'}", err=True)
            if write is not None:  # each time: a run that is interrupted goes on where it was
                known[row.name] = row
                replace_file(write, write_csv(known.values()))
    typer.echo(json.dumps([asdict(row) for row in rows], indent=2) if as_json else markdown(rows))
    red = [row for row in rows if row.faults]
    if check and red:
        raise GateFailed(
            f"expected {len(rows)} green kernels, got {len(red)} red ones, the first: "
            f"{red[0].name}: {'; '.join(red[0].faults)}"
        )


@app.command(
    epilog="\b\nExamples:\n  flashbulb kernels verify\n  TRITON_INTERPRET=1 flashbulb kernels verify --dtype bf16"
)
def verify(dtype: DType = "all") -> None:
    """Compare the kernels with their definition on this machine: values and, where there are kernels, gradients."""
    import torch

    device = torch.device(GPU if torch.cuda.is_available() else "cpu")
    _verify(device, _dtypes(DTYPES if dtype == "all" else (dtype,)), talk=True)


@app.command(
    epilog="\b\nExamples:\n  flashbulb kernels bench\n  flashbulb kernels bench --family sd35,cogvideox --dtype fp16 "
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
    from .attention.availability import arch_of
    from .errors import KernelError, KernelUnavailable

    listed = verification.cases(dtypes, arch_of(device))
    if not listed:
        raise KernelUnavailable(
            f"expected a dtype with kernels on this GPU, got {', '.join(map(str, dtypes))}"
        )
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


def _variants(arch: str, entry: str, dtype: str, head_dim: str) -> "list[Variant]":
    """List the variants that the options name; "all" is everything of its kind."""
    from .aot import ARCHS, FORMS, shipped_variants
    from .tiles import HEAD_DIMS

    def names(given: str, known: tuple[str, ...]) -> tuple[str, ...]:
        return known if given == "all" else tuple(name.strip() for name in given.split(","))

    dims = names(head_dim, tuple(map(str, HEAD_DIMS)))
    try:
        return shipped_variants(
            names(arch, ARCHS),
            names(entry, tuple(FORMS)),
            names(dtype, DTYPES),
            tuple(int(dim) if dim.isdecimal() else dim for dim in dims),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
