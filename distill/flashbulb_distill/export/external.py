"""Place a graph's weights: each initialiser becomes a reference into the safetensors files of its component.

Nothing is copied, so memory and disk hold the weights once, however large they are, and a graph cannot drift from
the weights beside it. ONNX calls this external data: a file, an offset and a length.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors.torch import save_file

from .families import Component
from .graph import UNPLACED, networks_of

DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
}
_MAX_HEADER_BYTES = 100 << 20
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def weight_files(folder: Path) -> list[Path]:
    """Return the files that from_pretrained loads: those of the index where there is one, and of no variant like fp16.

    Raises:
        ValueError: there is no such file, or one of the index is missing.
    """
    whole = folder / "model.safetensors"
    if whole.is_file():  # transformers takes it before an index; diffusers has another name
        return [whole]
    for index in folder.glob(f"*{_INDEX}"):
        if "." in index.name.removesuffix(_INDEX):  # of a variant, as diffusers once named it
            continue
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"{index}: expected the files that it names, found no {missing[0]}; fetch it anew"
            )
        return files
    files = sorted(file for file in folder.glob("*.safetensors") if "." not in file.stem)
    if not files:
        raise ValueError(
            f"{folder}: expected *.safetensors files, found none beside those of variants like fp16; "
            "save the model there first"
        )
    return files


def read_places(folder: Path) -> dict[str, Place]:
    """Return the place of every tensor in a folder's `weight_files`; reads headers only.

    Raises:
        ValueError: there is no such file, or one is damaged.
    """
    places = {}
    for file in weight_files(folder):
        with file.open("rb") as handle:
            head = handle.read(8)
            header_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER_BYTES + 1
            if header_bytes > min(_MAX_HEADER_BYTES, file.stat().st_size):
                raise ValueError(f"{file}: expected a safetensors header, found none; the file is damaged")
            header: dict[str, Any] = json.loads(handle.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            places[name] = Place(
                file, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + start, end - start
            )
    return places


def save_weights(network: torch.nn.Module, folder: Path, *, shard_bytes: int = 256 << 20) -> None:
    """Write a network's tensors as weights-00000.safetensors and on, shared ones once.

    One file at a time is in memory twice, so shards are small beside the weights.
    """
    shard: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    count = 0
    for name, tensor in network.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place in seen and tensor.numel() > 0:
            continue
        seen.add(place)
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            save_file(shard, folder / f"weights-{count:05d}.safetensors")
            shard, count = {}, count + 1
        shard[name] = tensor.contiguous()
    save_file(shard, folder / f"weights-{count:05d}.safetensors")


def place_weights(
    model: ir.Model, component: Component, folders: Mapping[torch.nn.Module, Path], root: Path
) -> None:
    """Let the graph's weights be tensors of safetensors files; the graph will lie in `root`, above them.

    A tensor of another dtype is cast in the graph, which a runtime does once, when it loads.

    Args:
        component: that the graph was traced from.   folders: where each of its networks is saved.

    Raises:
        ValueError: a weight is in no file, or has another shape there.
    """
    stored = {
        f"{prefix}{name}": (folders[network], place)
        for prefix, network in networks_of(component).items()
        for name, place in _places_of(network, read_places(folders[network])).items()
    }
    casts = []
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.location != UNPLACED:
            continue
        assert value.name is not None and value.dtype is not None
        folder, place = stored[value.name]
        if place is None or place.shape != tuple(value.shape or ()):
            found = "none" if place is None else f"shape {place.shape}"
            raise ValueError(
                f"{folder}: expected {value.name} of shape {tuple(value.shape or ())}, found {found}"
            )
        placed = ir.ExternalTensor(
            place.file.relative_to(root).as_posix(),
            place.offset,
            place.length,
            DTYPES[place.dtype],
            shape=ir.Shape(place.shape),
            name=value.name,
            base_dir=root,
        )
        if placed.dtype == value.dtype:
            value.const_value = placed
        else:
            casts.append(_cast(model.graph, value, placed))
    if casts:
        model.graph.insert_before(model.graph[0], casts)


def _cast(graph: ir.Graph, value: ir.Value, stored: ir.ExternalTensor) -> ir.Node:
    """Replace an initialiser by a cast of what is stored."""
    assert value.name is not None and value.dtype is not None
    name = value.name
    del graph.initializers[name]
    value.name = f"{name}/placed"
    value.const_value = None
    source = ir.Value(name=name, shape=stored.shape, type=ir.TensorType(stored.dtype), const_value=stored)
    graph.register_initializer(source)
    node = ir.node("Cast", [source], {"to": value.dtype.value}, name=f"{name}/cast")
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{name}/cast", value.shape, value.type
    value.replace_all_uses_with(output)
    return node


def _places_of(network: torch.nn.Module, places: Mapping[str, Place]) -> dict[str, Place | None]:
    """Find the place of each of a network's tensors; shared ones are stored under one of their names.

    A name may be stored behind a prefix: published files of CLIPTextModel say text_model., which transformers drops
    when it loads them and writes again when it saves.
    """
    state = network.state_dict()
    others = {stored: place for stored, place in places.items() if stored not in state}

    def find(name: str, shape: tuple[int, ...]) -> Place | None:
        if name in places:
            return places[name]
        found = [p for stored, p in others.items() if stored.endswith(f".{name}") and p.shape == shape]
        return found[0] if len(found) == 1 else None

    own = {name: find(name, tuple(tensor.shape)) for name, tensor in state.items()}
    by_memory = {
        (tensor.data_ptr(), tuple(tensor.shape)): own[name]
        for name, tensor in state.items()
        if own[name] is not None
    }
    return {
        name: own[name] or by_memory.get((tensor.data_ptr(), tuple(tensor.shape)))
        for name, tensor in state.items()
    }
