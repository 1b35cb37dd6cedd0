"""flashbulb export: graphs of diffusers folders, engines of bundles."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Export networks to ONNX, and bundles to TensorRT engines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


class Dtype(StrEnum):
    """What a graph computes in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class FlavorOption(StrEnum):
    """Which TensorRT."""

    rtx = "rtx"
    standard = "standard"


@app.callback()
def export() -> None:
    """Export networks to ONNX, and bundles to TensorRT engines."""


@app.command(
    epilog="\b\nExamples:\n  flashbulb export onnx ./stable-diffusion-3.5-large --opset 23 --dtype bfloat16\n  "
    "flashbulb export onnx ./CogVideoX-5b --no-check"
)
def onnx(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="a diffusers pipeline: SDXL, SD3, SD3.5, CogVideoX")
    ],
    opset: Annotated[int, typer.Option("--opset", help="18: widest reach; 23: attention as one node")] = 18,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="[as the weights are stored]")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="hold each graph against torch")] = True,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="graphs by network configuration [off]")
    ] = None,
) -> None:
    """Write a graph beside the weights of each network of a pipeline; the weights are named, not copied."""
    import torch

    from .pipeline import export_pipeline

    chosen = None if dtype is None else getattr(torch, dtype)
    for part in export_pipeline(folder, opset=opset, dtype=chosen, check=check, cache=cache):
        if part.parity is None:
            verdict = "not compared with torch"
        else:
            verdict = f"differs from torch by {part.parity.error:.1e} of at most {part.parity.tolerance:.1e}"
        print(f"{part.path}: {verdict}", flush=True)


@app.command(
    epilog="\b\nExamples:\n  flashbulb export tensorrt models/emoji/1 --flavor rtx --target sm_86,sm_89\n  "
    "flashbulb export tensorrt models/emoji/1 --flavor standard"
)
def tensorrt(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="a bundle's folder, like models/emoji/1")],
    flavor: Annotated[
        FlavorOption,
        typer.Option("--flavor", help="rtx builds without a GPU; standard tunes on the GPU at hand"),
    ] = FlavorOption.rtx,
    target: Annotated[
        str,
        typer.Option(
            "--target", help="compute capabilities, such as sm_86,sm_89 [standard: the GPU at hand]"
        ),
    ] = "",
    max_batch: Annotated[
        int | None, typer.Option("--max-batch", min=1, help="largest batch of the engines [the bundle's]")
    ] = None,
) -> None:
    """Build an engine of each of a bundle's graphs into its engines/ folder; the rest of the bundle is untouched."""
    from .tensorrt import TargetError, build_engines, gpu_at_hand, open_for_engines

    targets = tuple(part.strip() for part in target.split(",") if part.strip())
    try:
        folder = build_engines(
            open_for_engines(bundle),
            flavor.value,
            targets,
            gpu=gpu_at_hand() if flavor is FlavorOption.standard else None,
            max_batch=max_batch,
            on_engine=lambda name, engine: print(
                f"{name}: {engine.bytes / 1e6:.1f} MB in {engine.build_s:.1f} s", file=sys.stderr, flush=True
            ),
        )
    except TargetError as error:
        raise typer.BadParameter(str(error)) from error
    print(folder)
