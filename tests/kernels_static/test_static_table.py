"""The committed table: green, and of the kernels as they are."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashbulb_kernels.aot import ARCHS, DTYPES, FORMS, compile_variants, shipped_variants
from flashbulb_kernels.cli import app
from flashbulb_kernels.inspect import Row, faults, inspect
from flashbulb_kernels.static_table import current, read_csv, stale, write_csv
from flashbulb_kernels.tiles import HEAD_DIMS, backward_entries, has_tile

TABLE = Path(__file__).parents[2] / "kernels" / "static-table.csv"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_csv(TABLE.read_text(encoding="utf-8"))


def test_no_row_is_red(rows: list[Row]) -> None:
    """Judged anew by its numbers, not by what the file says of them."""
    assert [(row.name, row.faults, faults(row)) for row in rows if row.faults or faults(row)] == []


def test_the_table_is_whole_and_of_the_kernels_as_they_are(rows: list[Row]) -> None:
    """After a change to a kernel: flashbulb kernels inspect --check --write kernels/static-table.csv"""
    assert len({row.name for row in rows}) == len(rows)
    assert stale(rows, shipped_variants()) == []


def test_a_changed_tile_is_noticed(rows: list[Row]) -> None:
    variants = [v for v in shipped_variants() if str(v) == rows[0].name]
    assert stale(rows[:1], variants) == []
    assert stale([replace(rows[0], key="0" * 12)], variants) == [rows[0].name]
    assert stale(rows[:1], []) == [rows[0].name]


@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128])
def test_head_dimensions_to_128_train_in_16_bits_and_on_sm_120_to_64(head_dim: int) -> None:
    """Forward, fused and gradients, with and without a mask. SDXL, SD3, SD3.5 and CogVideoX have heads of 64."""
    for arch in ARCHS:
        if arch == "sm_120" and head_dim > 64:
            continue
        for dtype in ("fp16", "bf16"):
            entries = ("forward", "fused", *backward_entries(dtype, head_dim, arch))
            shipped = shipped_variants((arch,), entries, (dtype,), (head_dim,))
            assert len(shipped) == sum(len(FORMS[entry]) for entry in entries)


@pytest.mark.parametrize("arch", ARCHS)
def test_dk_and_dv_come_together_or_apart_and_never_both_ways(arch: str) -> None:
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):
        apart = [has_tile(entry, dtype, head_dim, arch) for entry in ("dk", "dv")]
        assert apart[0] == apart[1]
        assert not (apart[0] and has_tile("dkdv", dtype, head_dim, arch))


def test_only_green_rows_of_kernels_as_they_are_are_kept(rows: list[Row]) -> None:
    old, red = replace(rows[1], key="0" * 12), replace(rows[2], faults=("4 bytes of registers spilled",))
    gone = replace(rows[3], head_dim=48)
    assert current([rows[0], old, red, gone]) == [rows[0]]


def test_a_table_that_is_up_to_date_is_neither_compiled_nor_changed(tmp_path: Path) -> None:
    """Rows of other kernels than those asked for stay, and no compiler starts: the cache is never made."""
    table = tmp_path / "table.csv"
    table.write_bytes(TABLE.read_bytes())
    asked = ["--check", "--dtype", "fp16", "--head-dim", "64", "--entry", "dkdv", "--arch", "sm_80"]
    run = CliRunner().invoke(
        app, ["inspect", *asked, "--write", str(table), "--cache-dir", str(tmp_path / "no")]
    )
    assert run.exit_code == 0, run.output
    assert "2 of 2 kernels are in" in run.output
    assert table.read_bytes() == TABLE.read_bytes()
    assert not (tmp_path / "no").exists()


def test_each_row_is_in_the_table_before_the_next_is_made(
    rows: list[Row], tmp_path: Path, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    """A run that is killed keeps what it had; a row that is stale goes at once."""
    table = tmp_path / "table.csv"
    table.write_text(write_csv([replace(rows[0], key="0" * 12), rows[5]]), encoding="utf-8")
    asked = [row for row in rows if (row.entry, row.dtype, row.head_dim) == ("delta", "fp16", 64)]
    seen = []

    def describe(results: object, scratch: Path, jobs: int) -> Iterator[Row]:
        for row in asked:
            seen.append(len(read_csv(table.read_text(encoding="utf-8"))))
            yield row

    monkeypatch.setattr("flashbulb_kernels.inspect.inspect", describe)
    monkeypatch.setattr("flashbulb_kernels.aot.compile_variants", lambda *a: iter(()))
    options = ["--entry", "delta", "--dtype", "fp16", "--head-dim", "64", "--write", str(table)]
    assert CliRunner().invoke(app, ["inspect", *options]).exit_code == 0
    assert seen == [1 + done for done in range(len(asked))]
    assert read_csv(table.read_text(encoding="utf-8")) == sorted(
        [rows[5], *asked], key=lambda row: rows.index(row)
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kernel_compiled_anew_is_its_row(rows: list[Row], tmp_path: Path) -> None:
    """One that trains, on the architecture with the least shared memory."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'flashbulb[gpu]'")
    variants = [v for v in shipped_variants(("sm_86",), ("dkdv",), ("bf16",), (64,)) if v.form == "plain"]
    (row,) = inspect(compile_variants(variants, tmp_path / "cache"), tmp_path / "scratch")
    assert row == next(listed for listed in rows if listed.name == row.name)
