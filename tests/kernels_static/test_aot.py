"""Kernels compiled for GPUs that are not here, and the gate on them. Compilers run in processes of their own."""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from flashbulb_kernels.aot import (
    ARCHS,
    Compiled,
    Variant,
    compile_variants,
    content_key,
    shipped_variants,
)
from flashbulb_kernels.errors import CompilationFailed
from flashbulb_kernels.gpus import LIMITS
from flashbulb_kernels.inspect import Row, inspect, tool
from flashbulb_kernels.tiles import Tile

pytest.importorskip("triton", reason="triton is not installed: pip install 'flashbulb[gpu]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPILLING = Tile(block_m=128, block_n=128, num_warps=4, num_stages=3)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def rows(cache: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def describe(variants: Iterable[Variant]) -> list[Row]:
        return list(inspect(compile_variants(variants, cache), tmp_path))

    return describe


def forward(arch: str, **change: object) -> Variant:
    (variant,) = (v for v in shipped_variants((arch,), ("forward",), ("fp16",), (64,)) if v.form == "plain")
    return Variant(
        **{name: getattr(variant, name) for name in ("entry", "form", "dtype", "head_dim", "arch", "tile")}
        | change  # type: ignore[arg-type]
    )


def test_forward_is_green_on_every_architecture(rows) -> None:  # type: ignore[no-untyped-def]
    """And on each with the instruction of its own tensor cores."""
    described = rows(forward(arch) for arch in ARCHS)
    assert {row.arch for row in described} == set(ARCHS)
    assert [(row.arch, row.faults) for row in described if row.faults] == []
    assert all(row.tensor >= 8 and row.tensor_sass >= 8 for row in described), LIMITS


def test_without_the_promise_of_alignment_the_row_is_red(rows) -> None:  # type: ignore[no-untyped-def]
    """A stride that may be odd turns 16-byte copies into 16-bit loads, and no result shows it."""
    (row,) = rows([forward("sm_80", unaligned=("stride_kn", "stride_vn"))])
    assert row.async_copies == 0
    assert row.scalar_loads >= 64
    assert any("scalar 16-bit loads" in fault for fault in row.faults)
    assert any("no asynchronous copies" in fault for fault in row.faults)


def test_a_tile_that_spills_turns_the_row_red(rows) -> None:  # type: ignore[no-untyped-def]
    (row,) = rows([forward("sm_80", tile=SPILLING)])
    assert row.spill_bytes > 0 and row.stack_bytes > 0
    assert any("registers spilled" in fault for fault in row.faults)


def test_gradients_of_wide_heads_spill_together_and_not_apart(rows) -> None:  # type: ignore[no-untyped-def]
    """Why `dk` and `dv` are kernels of their own: with the same tile one that gives both is red."""
    apart = [v for v in shipped_variants(("sm_80",), ("dk", "dv"), ("fp16",), (128,)) if v.form == "plain"]
    together = replace(apart[0], entry="dkdv")
    described = {row.entry: row for row in rows([*apart, together])}
    assert described["dk"].faults == () and described["dv"].faults == ()
    assert any("registers spilled" in fault for fault in described["dkdv"].faults)


def test_what_was_compiled_once_comes_from_the_cache(cache: Path) -> None:
    variant = forward("sm_80")
    list(compile_variants([variant], cache))
    ((_, again),) = compile_variants([variant], cache)
    assert isinstance(again, Compiled) and again.cached
    assert again.key == content_key(variant)
    assert again.ptx.count(".entry") == 1


def test_tile_and_architecture_are_part_of_the_key() -> None:
    keys = {
        content_key(forward("sm_80")),
        content_key(forward("sm_86")),
        content_key(forward("sm_80", tile=SPILLING)),
    }
    assert len(keys) == 3


def test_a_variant_that_cannot_compile_is_told_and_the_others_go_on(cache: Path) -> None:
    """A block of 48 rows is no power of two, which Triton refuses."""
    odd = forward("sm_80", tile=Tile(48, 64, 4, 2))
    results = dict(compile_variants([odd, forward("sm_80")], cache))
    assert isinstance(results[odd], CompilationFailed)
    assert "forward/plain fp16 d64 sm_80" in str(results[odd])
    assert isinstance(results[forward("sm_80")], Compiled)


# Answers as the compiler does, and dies of the architecture sm_86.
MORTAL = """
import json, os, pathlib, sys
for line in sys.stdin:
    told = json.loads(line)
    if told["arch"] == "sm_86":
        os._exit(3)
    for name in ("kernel.ptx", "kernel.cubin", "ptxas.log"):
        (pathlib.Path(told["folder"]) / name).write_text("made")
    (pathlib.Path(told["folder"]) / "metadata.json").write_text("{}")
    print('{"error": null}', flush=True)
"""


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """Replace the compilers, and list those that were started."""
    started = []

    def start(scratch: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        started.append(subprocess.Popen([sys.executable, "-Sc", MORTAL], stdin=pipe, stdout=pipe, text=True))
        return started[-1]

    monkeypatch.setattr("flashbulb_kernels.aot._worker", start)
    return started


def test_a_compiler_that_dies_is_told_and_another_goes_on(
    mortal: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The next variant was written to the dead one: a BrokenPipeError ended everything."""
    variants = [forward(arch) for arch in ("sm_80", "sm_86", "sm_89", "sm_90")]
    results = dict(compile_variants(variants, tmp_path, jobs=1))
    assert isinstance(results[variants[1]], CompilationFailed)
    assert "the compiler's process ended with code 3" in str(results[variants[1]])
    assert all(isinstance(results[variants[i]], Compiled) for i in (0, 2, 3))
    assert len(mortal) == 2


def test_who_stops_reading_leaves_no_compiler_behind(
    mortal: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    results = compile_variants([forward(arch) for arch in ("sm_86", *ARCHS)], tmp_path, jobs=2)
    next(iter(results))
    results.close()  # type: ignore[attr-defined]
    assert mortal and all(worker.poll() is not None for worker in mortal)


def test_hopper_gets_ptx_that_a_driver_of_cuda_12_reads(cache: Path) -> None:
    ((_, compiled),) = compile_variants([forward("sm_90")], cache)
    assert isinstance(compiled, Compiled)
    assert ".version 8.8" in compiled.ptx


def test_importing_the_compiler_loads_neither_triton_nor_torch() -> None:
    code = "import sys, flashbulb_kernels.static_table; print({'triton', 'torch'} & {*sys.modules})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


def test_the_binary_tools_come_with_triton() -> None:
    assert Path(tool("cuobjdump")).exists() and Path(tool("ptxas-blackwell")).exists()
