"""Embeddings of prompts in a safetensors file that is written a batch at a time: ten thousand of T5's are 55 GB."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from .denoiser import Condition

ALIGNMENT = 8  # of the header's end, as the format asks


def write_embeddings(path: Path, count: int, parts: Iterable[Condition]) -> None:
    """Write float32 conditions of `count` rows in all; the file appears whole or not at all.

    Raises:
        ValueError: the parts have another number of rows.
    """
    temporary = path.with_suffix(".tmp")
    starts: dict[str, int] = {}
    done = 0
    with temporary.open("wb") as file:
        for part in parts:
            tensors = {"tokens": part.tokens, "pooled": part.pooled}
            if not starts:
                shapes = {name: [count, *tensor.shape[1:]] for name, tensor in tensors.items()}
                header, starts = _header(shapes)
                file.write(header)
            for name, tensor in tensors.items():
                data = tensor.to(torch.float32).contiguous().numpy()
                file.seek(starts[name] + done * data[:1].nbytes)
                file.write(data.tobytes())
            done += len(part)
    if done != count:
        temporary.unlink()
        raise ValueError(f"{path}: expected {count} rows, got {done}")
    temporary.replace(path)


def read_embeddings(path: Path) -> Condition:
    """Map a file's rows into memory."""
    return Condition(**load_file(path))


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
