"""How a kernel cuts its work: block sizes, warps and pipeline stages, from the table `tiles.json`.

The table is keyed by entry, dtype, head dimension and architecture; "*" serves the architectures that are not named.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD_DIMS = (32, 40, 64, 80, 96, 128, 160)


@dataclass(frozen=True, slots=True)
class Tile:
    """How one kernel is cut.

    Args:
        block_m, block_n: rows of queries and of keys per block.
        num_warps: warps per program.   num_stages: of the pipeline of loads.
        reload: read what does not change in the loop (a block of q, or of k and v) from shared memory in every step,
            where keeping it in registers would spill.
        columns: width of the pieces in which a head is read and held, a power of two; 0: one piece, the power of two
            that holds the head.
        owned: pieces of a result that one program computes; 0: all. Fewer cost registers less, and the scores are
            computed once for each part.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    reload: bool = False
    columns: int = 0
    owned: int = 0

    def constants(self, head_dim: int) -> dict[str, int]:
        """Return the compile-time arguments of a kernel that works in pieces."""
        return {
            "COLUMNS": self.columns or block_d(head_dim),
            "OWNED": self.owned or self.pieces(head_dim),
            "PARTS": self.parts(head_dim),
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "RELOAD": self.reload,
        }

    def pieces(self, head_dim: int) -> int:
        """Return into how many pieces a head is cut."""
        return -(-head_dim // (self.columns or block_d(head_dim)))

    def parts(self, head_dim: int) -> int:
        """Return how many programs share a block of a result."""
        return -(-self.pieces(head_dim) // self.owned) if self.owned else 1


# The interpreter's time goes by blocks, not by what they hold.
INTERPRETER = Tile(block_m=128, block_n=128, num_warps=4, num_stages=1)


def tile_for(entry: str, dtype: str, head_dim: int, arch: str) -> Tile:
    """Look up the tile of an entry for a dtype ("fp16", "bf16", "fp32"), a head dimension and an arch like "sm_90".

    The arch "interpreter" has one tile for everything.

    Raises:
        ValueError: no tile is listed, so the kernel does not exist there; the message names what is listed.
    """
    if arch == "interpreter":
        return INTERPRETER
    of_entry = _table().get(entry, {})
    of_heads = of_entry.get(dtype, {})
    of_arch = of_heads.get(str(head_dim), {})
    row = of_arch.get(arch, of_arch.get("*"))
    if row is None:
        raise ValueError(
            f"no tile for {entry}, {dtype}, head dimension {head_dim}, {arch}: tiles.json lists entries "
            f"{sorted(_table())}, dtypes {sorted(of_entry)}, head dimensions {sorted(map(int, of_heads))}"
        )
    return Tile(**row)


def has_tile(entry: str, dtype: str, head_dim: int, arch: str) -> bool:
    """Say whether `tile_for` has an answer: whether the kernel exists for these."""
    row = _table().get(entry, {}).get(dtype, {}).get(str(head_dim), {})
    return arch == "interpreter" or arch in row or "*" in row


def backward_entries(dtype: str, head_dim: int, arch: str) -> tuple[str, ...]:
    """Name the kernels of a backward pass: dK and dV come from one, or from one each where both would spill registers.

    Where there is no backward pass, the last name is one that has no tile.
    """
    together = has_tile("dkdv", dtype, head_dim, arch)
    apart = not together and has_tile("dk", dtype, head_dim, arch)
    return "delta", "dq", *(("dk", "dv") if apart else ("dkdv",))


def has_backward(dtype: str, head_dim: int, arch: str) -> bool:
    """Say whether there are kernels for gradients."""
    return all(has_tile(entry, dtype, head_dim, arch) for entry in backward_entries(dtype, head_dim, arch))


def block_d(head_dim: int) -> int:
    """Return the power of two that holds a head: blocks have such sizes, and a matrix product needs 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((Path(__file__).parent / "tiles.json").read_text(encoding="utf-8"))
    return table
