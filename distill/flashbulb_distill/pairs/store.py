"""ODE pairs on disk: index.jsonl names shard-*.safetensors, each with x_T, x_0 and which prompt.

Shards are written whole and renamed into place; the index is what counts, so an interrupted run goes on where its
index ends.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..bundle import hash_file

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
    _drop_torn_line(folder / INDEX)
    entries = _entries(folder)
    return sum(entry["count"] for entry in entries), len(entries)


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
    with (folder / INDEX).open("a") as index:
        index.writelines(json.dumps(entry) + "\n" for entry in entries)


def read_pairs(folder: Path) -> Pairs:
    """Load a store whole.

    Raises:
        ValueError: a shard is missing or damaged, or there is none.
    """
    entries = _entries(folder)
    if not entries:
        raise ValueError(f"{folder}: expected ODE pairs, found none; run the pairs stage first")
    shards = []
    for entry in entries:
        path = folder / entry["file"]
        if not path.is_file() or hash_file(path) != entry["sha256"]:
            raise ValueError(
                f"{path}: expected sha256 {entry['sha256']}, found another or no file; make the pairs anew"
            )
        shards.append(load_file(path))
    joined = {key: torch.cat([shard[key] for shard in shards]) for key in ("x_T", "x_0", "prompt")}
    prompts = tuple(json.loads((folder / PROMPTS).read_text()))
    return Pairs(joined["x_T"].float(), joined["x_0"].float(), joined["prompt"], prompts)


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Read the index; a last line without its end was torn by an interruption, and its shard does not count."""
    path = folder / INDEX
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line without its end, so that the next one does not continue it."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])
