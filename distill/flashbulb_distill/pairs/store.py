"""ODE pairs on disk: index.jsonl names shard-*.safetensors, each with x_T, x_0 and which prompt.

Shards are written whole and renamed into place; the index is what counts, so an interrupted run goes on where its
index ends, and others may read what it names while more is made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..bundle import hash_file
from .lines import add_lines, drop_torn_line, read_lines

INDEX = "index.jsonl"
PROMPTS = "prompts.json"


@dataclass(frozen=True, slots=True)
class Pairs:
    """All pairs of a store: x_T and x_0 [n, c, h, w] float32, and each one's row in `prompts`, int64 [n]."""

    x_T: Tensor
    x_0: Tensor
    prompt: Tensor
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompt)

    def known(self, step: int) -> int:
        """Return how many pairs a step draws from: all of them."""
        return len(self)


class DrawnPairs(Protocol):
    """Pairs to draw from, whether all are there from the beginning or not."""

    @property
    def x_T(self) -> Tensor:
        """Noise, float32 [n, c, h, w]."""
        ...

    @property
    def x_0(self) -> Tensor:
        """Clean latents, float32 [n, c, h, w]."""
        ...

    @property
    def prompt(self) -> Tensor:
        """Each pair's row among the prompts, int64 [n]."""
        ...

    def known(self, step: int) -> int:
        """Return how many pairs, the first ones, a step draws from."""
        ...


def start_store(folder: Path, prompts: tuple[str, ...]) -> tuple[int, int]:
    """Create the store or check that an existing one has the same prompts; return how many pairs and shards it holds.

    Raises:
        ValueError: the folder holds pairs of other prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PROMPTS
    if path.exists():
        if tuple(json.loads(path.read_text())) != prompts:
            raise ValueError(
                f"{folder}: holds pairs of other prompts; expected the same, choose another folder"
            )
    else:
        path.write_text(json.dumps(prompts))
    drop_torn_line(folder / INDEX)
    return count_pairs(folder), len(read_lines(folder / INDEX))


def count_pairs(folder: Path) -> int:
    """Return how many pairs a store holds so far."""
    return sum(entry["count"] for entry in read_lines(folder / INDEX))


def write_shard(folder: Path, number: int, x_T: Tensor, x_0: Tensor, prompt: Tensor) -> dict[str, Any]:
    """Write one shard and return its entry, which `add_to_index` makes count."""
    name = f"shard-{number:05d}.safetensors"
    temporary = folder / f".{name}.tmp"
    tensors = {"x_T": x_T.half(), "x_0": x_0.half(), "prompt": prompt}
    save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
    entry = {"file": name, "count": len(prompt), "sha256": hash_file(temporary)}
    temporary.replace(folder / name)
    return entry


def add_to_index(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Make written shards part of the store."""
    add_lines(folder / INDEX, entries)


def read_pairs(folder: Path, count: int | None = None, *, after: Pairs | None = None) -> Pairs:
    """Load a store's first `count` pairs, as many as its first shards hold; all by default.

    Args:
        after: its first pairs, which were loaded before.
    Raises:
        ValueError: a shard is missing or damaged, or there are none, or no shard ends at `count`.
    """
    entries = read_lines(folder / INDEX)
    if not entries:
        raise ValueError(f"{folder}: expected ODE pairs, found none; run the pairs stage first")
    begin, shards = len(after) if after is not None else 0, []
    ends = list(accumulate(entry["count"] for entry in entries))
    stop = ends[-1] if count is None else count
    if stop not in ends:
        raise ValueError(
            f"{folder}: expected {stop} pairs in its first shards, found {ends[-1]}; make the pairs anew"
        )
    for entry, end in zip(entries, ends, strict=True):
        if not begin < end <= stop:
            continue
        path = folder / entry["file"]
        if not path.is_file() or hash_file(path) != entry["sha256"]:
            raise ValueError(
                f"{path}: expected sha256 {entry['sha256']}, found another or no file; make the pairs anew"
            )
        shards.append(load_file(path))
    x_T, x_0, prompt = ([shard[key] for shard in shards] for key in ("x_T", "x_0", "prompt"))
    if after is not None:
        x_T, x_0, prompt = [after.x_T, *x_T], [after.x_0, *x_0], [after.prompt, *prompt]
    x_T, x_0 = ([part.float() for part in each] for each in (x_T, x_0))
    prompts = tuple(json.loads((folder / PROMPTS).read_text()))
    return Pairs(torch.cat(x_T), torch.cat(x_0), torch.cat(prompt), prompts)
