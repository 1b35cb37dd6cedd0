"""What a compiled kernel is made of, read from PTX, SASS and ptxas's log, and the gate that it has to pass.

Everything is static: registers, spills, shared memory and which instructions are there. No time follows from it.
"""

import collections
import functools
import re
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .aot import Compiled, Variant
from .errors import CompilationFailed, KernelUnavailable
from .gpus import LIMITS, occupancy, tile_intensity

# What multiplies on tensor cores, in PTX and in machine code (SASS).
UNITS_PTX = {"mma.sync": r"mma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma"}
UNITS_SASS = {"mma.sync": r"HMMA", "wgmma": r"HGMMA", "tcgen05": r"UTC\w*MMA"}
ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
# Matrix products per block, scores and results. `delta` multiplies element by element, once, in no loop.
PRODUCTS = {
    "forward": (1, 1), "fused": (1, 1), "tensorrt": (1, 1), "delta": (0, 0),
    "dkdv": (2, 2), "dk": (2, 1), "dv": (1, 1), "dq": (2, 1),
}  # fmt: skip
KEY_DIGITS = 12  # of the content hash, in the table

_LABEL = re.compile(r"^\s*(\$L__BB\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)")
_SCALAR_16 = re.compile(r"\bld\.global(?:\.(?!v\d)[\w:]+)*\.[bus]16\b")
_ASYNC_16 = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^\n]*\],\s*(?:0x10|16)\b")
_BULK = re.compile(r"\bcp\.async\.bulk(?:\.tensor)?\.[\w.:]*shared")
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the static table.

    Args:
        key: the first digits of the variant's content hash.
        registers: per thread.   spill_bytes: stores and loads.   stack_bytes: per thread.   shared_bytes: per block.
        tensor: tensor-core instructions in PTX.   tensor_sass: in machine code.
        async_copies: 16-byte cp.async.   bulk_copies: TMA.   scalar_loads: 16-bit global loads in loops.
        blocks: blocks an SM holds.   occupancy: share of its warps.   limiter: what bounds them.
        intensity: FLOP per byte that a program streams.
        faults: what the gate objects to; empty in a green row.
    """

    entry: str
    form: str
    dtype: str
    head_dim: int
    arch: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    reload: bool
    columns: int
    owned: int
    key: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    tensor: int
    tensor_sass: int
    async_copies: int
    bulk_copies: int
    scalar_loads: int
    blocks: int
    occupancy: float
    limiter: str
    intensity: float
    faults: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.entry}/{self.form} {self.dtype} d{self.head_dim} {self.arch}"


COLUMNS = tuple(field.name for field in fields(Row))
_NUMBERS = (*COLUMNS[COLUMNS.index("registers") : COLUMNS.index("limiter")], "intensity")


def loops(ptx: str) -> list[str]:
    """Return the text of every loop: from a label to the branch back to it."""
    lines = ptx.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line))}
    return [
        "\n".join(lines[labels[found[1]] : i + 1])
        for i, line in enumerate(lines)
        if (found := _BRANCH.search(line)) and labels.get(found[1], i) < i
    ]


def scalar_loads_in_loops(ptx: str) -> int:
    """Count loads of one 16-bit element from global memory inside loops: the mark of a lost alignment."""
    return max((len(_SCALAR_16.findall(loop)) for loop in loops(ptx)), default=0)


def ptxas_usage(log: str) -> dict[str, int]:
    """Read registers, stack and spill bytes from what `ptxas -v` said.

    Raises:
        ValueError: the log does not say.
    """
    registers = re.search(r"Used (\d+) registers", log)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or frame is None:
        raise ValueError(f"expected ptxas -v to name registers and spills, got {log.strip()[:200]!r}")
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(frame[1]),
        "spill_bytes": int(frame[2]) + int(frame[3]),
    }


def opcodes(cubin: bytes, scratch: Path) -> Mapping[str, int]:
    """Disassemble machine code and count its operations.

    Raises:
        KernelUnavailable: Triton, which brings the disassembler, is not installed.
        CompilationFailed: the disassembler does not read it.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    file = scratch / "kernel.cubin"
    file.write_bytes(cubin)
    listed = subprocess.run(
        [tool("cuobjdump"), "-sass", file], capture_output=True, text=True, timeout=120, check=False
    )
    counts = collections.Counter(_OPCODE.findall(listed.stdout))
    if not counts:
        raise CompilationFailed(f"cuobjdump found no code: {listed.stderr.strip()[:200]}")
    return counts


@functools.cache
def tool(name: str) -> str:
    """Find one of the binary tools that Triton's wheel brings: ptxas, ptxas-blackwell, cuobjdump."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise KernelUnavailable("Triton is not installed: pip install 'flashbulb[gpu]'")
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def row(compiled: Compiled, sass: Mapping[str, int]) -> Row:
    """Describe a compiled kernel; `sass` counts its operations."""
    variant, ptx, metadata = compiled.variant, compiled.ptx, compiled.metadata
    usage = ptxas_usage(compiled.log)
    unit = LIMITS[variant.arch].unit
    held = occupancy(
        variant.arch,
        metadata["num_warps"],
        usage["registers"],
        metadata["shared"],
        metadata["tmem_size"] if unit == "tcgen05" else 0,
    )
    described = Row(
        **_named(variant),
        key=compiled.key[:KEY_DIGITS],
        registers=usage["registers"],
        spill_bytes=usage["spill_bytes"],
        stack_bytes=usage["stack_bytes"],
        shared_bytes=metadata["shared"],
        tensor=len(re.findall(UNITS_PTX[unit], ptx)),
        tensor_sass=sum(n for op, n in sass.items() if re.fullmatch(UNITS_SASS[unit], op)),
        async_copies=len(_ASYNC_16.findall(ptx)),
        bulk_copies=len(_BULK.findall(ptx)),
        scalar_loads=scalar_loads_in_loops(ptx),
        blocks=held.blocks,
        occupancy=round(held.fraction, 3),
        limiter=held.limiter,
        intensity=_intensity(variant),
    )
    return replace(described, faults=tuple(faults(described)))


def faults(described: Row) -> list[str]:
    """Say what is wrong with a kernel, in the terms of its row; [] where nothing is."""
    limits = LIMITS[described.arch]
    wrong = []
    if described.spill_bytes:
        wrong.append(f"{described.spill_bytes} bytes of registers spilled")
    if described.shared_bytes > limits.shared_bytes_per_block:
        wrong.append(
            f"{described.shared_bytes} bytes of shared memory, {limits.shared_bytes_per_block} allowed"
        )
    if described.blocks < 1:
        wrong.append(f"no block fits an SM: {described.limiter}")
    if any(PRODUCTS[described.entry]):
        if not described.tensor or not described.tensor_sass:
            wrong.append(f"no {limits.unit}")
        if not described.async_copies + described.bulk_copies:
            wrong.append("no asynchronous copies of 16 bytes or more")
    if described.scalar_loads:
        wrong.append(f"{described.scalar_loads} scalar 16-bit loads in a loop")
    return wrong


def inspect(
    results: Iterable[tuple[Variant, Compiled | CompilationFailed]], scratch: Path, jobs: int = 2
) -> Iterable[Row]:
    """Describe results as they come, in their order; one that did not compile is a red row."""

    def describe(result: tuple[Variant, Compiled | CompilationFailed]) -> Row:
        variant, outcome = result
        if isinstance(outcome, CompilationFailed):
            return refused(variant, str(outcome))
        return row(outcome, opcodes(outcome.cubin, scratch / outcome.key))

    with ThreadPoolExecutor(jobs) as pool:
        # At most a handful wait, so that rows appear while the rest compiles.
        waiting: collections.deque[Any] = collections.deque()
        for result in results:
            waiting.append(pool.submit(describe, result))
            while len(waiting) > 2 * jobs or (waiting and waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def refused(variant: Variant, reason: str) -> Row:
    """Return the row of a variant that did not compile."""
    numbers: dict[str, Any] = dict.fromkeys(_NUMBERS, 0)
    return Row(**_named(variant), **numbers, key="", limiter="", faults=(reason,))


def _intensity(variant: Variant) -> float:
    of_scores, of_results = PRODUCTS[variant.entry]
    rows = variant.tile.block_n if variant.entry in ("dkdv", "dk", "dv") else variant.tile.block_m
    share = 1 / variant.tile.parts(variant.head_dim)
    # What a program does not own of a result it does not add, and what it owns it reads once more.
    again = of_results * share if share < 1 else 0
    products, streamed = of_scores + of_results * share, 2 + again
    if variant.entry == "dv" and share < 1:
        streamed = 1 + share  # q for the scores, and of dO the owned pieces alone
    return tile_intensity(rows, products, streamed, ELEMENT_BYTES[variant.dtype])


def _named(variant: Variant) -> dict[str, Any]:
    named: dict[str, Any] = asdict(variant)
    tile: dict[str, int] = named.pop("tile")
    del named["unaligned"], named["constants"]
    return named | tile
