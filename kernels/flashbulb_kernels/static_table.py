"""The static table: one row per shipped variant, committed as kernels/static-table.csv, and how it is shown.

Rows carry the first digits of the content hash of what was compiled, so that a table of older kernels is known as such.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .aot import Variant, content_key, shipped_variants
from .gpus import GPUS, Work, roofline
from .inspect import COLUMNS, KEY_DIGITS, Row

_KINDS: dict[str, Any] = {field.name: field.type for field in fields(Row)} | {"reload": "True".__eq__}

# One layer of each family at its usual size: samples, heads, queries, keys, head dimension, bytes per element.
LAYERS = {
    "SDXL 1024 px, self": Work(2, 10, 4096, 4096, 64, 2),
    "SDXL 1024 px, cross": Work(2, 10, 4096, 77, 64, 2),
    "SD3.5 large 1024 px, joint": Work(2, 38, 4096 + 333, 4096 + 333, 64, 2),
    "CogVideoX-2b 49 frames, joint": Work(2, 30, 17550 + 226, 17550 + 226, 64, 2),
}


def write_csv(rows: Iterable[Row]) -> str:
    """Write rows as CSV, sorted by name, faults joined by semicolons."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sorted(rows, key=_order):
        values = [getattr(row, name) for name in COLUMNS[:-1]]
        writer.writerow([*values, "; ".join(row.faults)])
    return out.getvalue()


def replace_file(path: Path, text: str) -> None:
    """Write a file as a whole: whoever reads or kills in between finds the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_csv(text: str) -> list[Row]:
    """Read what write_csv wrote.

    Raises:
        ValueError: the header is another.
    """
    header, *lines = csv.reader(io.StringIO(text))
    if tuple(header) != COLUMNS:
        raise ValueError(f"expected the columns {', '.join(COLUMNS)}, got {', '.join(header)}")
    rows = []
    for line in lines:
        values: dict[str, Any] = dict(zip(COLUMNS, line, strict=True))
        faults = tuple(fault for fault in values.pop("faults").split("; ") if fault)
        read = {name: _KINDS[name](value) for name, value in values.items()}
        rows.append(Row(**read, faults=faults))
    return rows


def stale(rows: Iterable[Row], variants: Iterable[Variant]) -> list[str]:
    """Name the variants that the table does not describe as they are now, and rows of variants that are gone."""
    keys = {row.name: row.key for row in rows}
    now = {str(variant): content_key(variant)[:KEY_DIGITS] for variant in variants}
    return sorted({name for name in keys.keys() | now.keys() if keys.get(name) != now.get(name)})


def current(rows: Iterable[Row]) -> list[Row]:
    """Return the green rows that describe shipped kernels as they are now."""
    rows = list(rows)
    names = {row.name for row in rows}
    old = set(stale(rows, (variant for variant in shipped_variants() if str(variant) in names)))
    return [row for row in rows if row.name not in old and not row.faults]


def markdown(rows: Sequence[Row]) -> str:
    """Show rows as a table, the red ones with what is wrong."""
    lines = [
        "| kernel | tile | regs | spill | stack | smem | tensor (SASS) | async, TMA | 16-bit | SM holds | FLOP/B | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_order):
        lines.append(
            f"| {row.name} | {row.block_m}x{row.block_n} w{row.num_warps} s{row.num_stages}{' reload' * row.reload}"
            f"{f' c{row.columns}' if row.columns else ''}{f' owns {row.owned}' if row.owned else ''} "
            f"| {row.registers} "
            f"| {row.spill_bytes} | {row.stack_bytes} | {row.shared_bytes} | {row.tensor} ({row.tensor_sass}) "
            f"| {row.async_copies} / {row.bulk_copies} | {row.scalar_loads} "
            f"| {row.blocks} blocks, {row.occupancy:.0%}, {row.limiter} | {row.intensity:.0f} "
            f"| {'; '.join(row.faults) or 'ok'} |"
        )
    return "\n".join(lines)


def roofline_markdown() -> str:
    """Show the bound that each GPU's datasheet puts on one attention of each family, in fp16 or bf16."""
    lines = [
        "| attention | FLOP/B | " + " | ".join(gpu.name for gpu in GPUS) + " |",
        "|---" * (len(GPUS) + 2) + "|",
    ]
    for name, work in LAYERS.items():
        bounds = (roofline(work, gpu, "fp16") for gpu in GPUS)
        cells = (f"{bound.seconds * 1e3:.3g} ms ({bound.by})" for bound in bounds)
        lines.append(f"| {name} | {work.intensity:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _order(row: Row) -> tuple[object, ...]:
    return row.entry, row.form, row.dtype, row.head_dim, int(row.arch.removeprefix("sm_"))
