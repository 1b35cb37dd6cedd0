"""Embeddings of prompts in a safetensors file that is written a batch at a time: ten thousand of T5's are 55 GB."""

import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from .denoiser import Condition

ALIGNMENT = 8  # of the header's end, as the format asks


def write_embeddings(
    path: Path,
    count: int,
    parts: Callable[[int], Iterable[Condition]],
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write float32 conditions of `count` rows in all; the file appears whole or not at all.

    What was broken off goes on behind its last whole batch, so the path must name all that decides the rows.

    Args:
        parts: row -> what follows from there, in batches of `batch_size` rows; the last may have fewer.
    Raises:
        ValueError: the parts have another number of rows.
    """
    temporary = path.with_suffix(".tmp")
    done, starts = _written(temporary)
    done -= done % batch_size
    if not done:
        starts = {}  # the file begins anew, its header with it
    with temporary.open("r+b" if done else "wb") as file:
        for part in parts(done):
            tensors = {"tokens": part.tokens, "pooled": part.pooled}
            if not starts:
                shapes = {name: [count, *tensor.shape[1:]] for name, tensor in tensors.items()}
                header, starts = _header(shapes)
                file.write(header)
            for name, tensor in tensors.items():
                data = tensor.to(torch.float32).contiguous().numpy()
                file.seek(starts[name] + done * data[:1].nbytes)
                os.fsync(file.fileno())  # what is told by where the file ends is on the disk before it
                file.write(data.tobytes())
            file.flush()
            done += len(part)
            progress(done, count)
    if done != count:
        temporary.unlink()
        raise ValueError(f"{path}: expected {count} rows, got {done}")
    temporary.replace(path)


def read_embeddings(path: Path) -> Condition:
    """Map a file's rows into memory."""
    return Condition(**load_file(path))


def _written(path: Path) -> tuple[int, dict[str, int]]:
    """Return how many rows of a file that was broken off are whole, and where each of its tensors begins."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
    except (FileNotFoundError, struct.error, ValueError):
        return 0, {}
    starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}
    # A batch's last tensor is written last, and lies at the end; one without bytes tells nothing.
    sizes = {name: 4 * torch.Size(entry["shape"][1:]).numel() for name, entry in entries.items()}
    last = [name for name, size in sizes.items() if size][-1]
    return max(0, path.stat().st_size - starts[last]) // sizes[last], starts


def _header(shapes: dict[str, list[int]]) -> tuple[bytes, dict[str, int]]:
    """Return the head of a file of float32 tensors, and where each begins."""
    entries: dict[str, object] = {}
    begins: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        begins[name], end = end, end + 4 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begins[name], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + begin for name, begin in begins.items()}
