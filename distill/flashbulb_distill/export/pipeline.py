"""Export networks: into a folder of their own, or beside the weights of a whole diffusers pipeline."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..errors import UsageError
from .draft import draft
from .external import Place, place_weights, read_places, save_weights, weight_files
from .families import Component, component_of, variants
from .graph import networks_of, save_graph, trace_graph
from .parity import Parity, check_component

GRAPH = "model.onnx"
PIPELINES = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "CogVideoXPipeline": "cogvideox",
}


@dataclass(frozen=True, slots=True)
class ExportedPart:
    """One graph that was written, and how it compares with torch (None: not compared)."""

    name: str
    path: Path
    parity: Parity | None


def export_component(
    component: Component, folder: Path, *, opset: int = 18, cache: Path | None = None
) -> Path:
    """Write a component's graph and, beside it, its weights; return the graph's path.

    Args:
        folder: of this component alone; it appears whole or not at all.
        opset, cache: as for `trace_graph`.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: the opset is not one of ours.
    """
    if folder.exists():
        raise FileExistsError(f"{folder}: expected a new folder, but it exists; remove it or choose another")
    graph = trace_graph(component, opset=opset, cache=cache)
    (network,) = networks_of(component).values()
    with draft(folder) as partial:
        save_weights(network, partial)
        place_weights(graph, component, {network: partial}, partial)
        save_graph(graph, partial / GRAPH)
    return folder / GRAPH


def export_pipeline(
    folder: Path,
    *,
    opset: int = 18,
    dtype: torch.dtype | None = None,
    check: bool = True,
    cache: Path | None = None,
) -> Iterator[ExportedPart]:
    """Write <name>.onnx into a diffusers folder for each of its networks, and yield each when it is there.

    The graphs name the folder's safetensors files as their weights, so nothing is copied. bfloat16 graphs are not
    compared: onnxruntime has no kernels for them on the CPU.

    Args:
        dtype: that the graphs compute in; as stored if None.
        check: hold each graph against torch; needs two to three times the memory of its weights.
    Raises:
        ValueError: no such folder, or weights are missing or lie elsewhere.
        ParityError: a graph does not compute what its network does; it is not written.
    """
    networks = find_networks(folder)
    for _, name, _ in networks:
        _refuse_links(folder, name)
    for family, name, network in networks:
        loaded = load_network(folder / name, network, dtype)
        component = component_of(family, name, loaded)
        graph = trace_graph(component, opset=opset, cache=cache)
        place_weights(graph, component, {loaded: folder / name}, folder)
        path = folder / f"{component.name}.onnx"
        temporary = path.with_name(f".{component.name}.{os.getpid()}.onnx")
        try:
            save_graph(graph, temporary)
            parity = None
            if check and next(component.module.parameters()).dtype != torch.bfloat16:
                parity = check_component(component.name, temporary, component.module, variants(component))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        yield ExportedPart(component.name, path, parity)


def _refuse_links(folder: Path, name: str) -> None:
    """Raise ValueError if weights are links, as in the hub's cache: neither onnx nor onnxruntime reads a graph's so."""
    for file in weight_files(folder / name):
        own = folder.resolve() / name / file.name
        if file.resolve() != own or own.stat().st_nlink > 1:
            raise UsageError(
                f"{file}: expected a file of its own, found a link, through which onnxruntime reads no weights; "
                "copy the folder (cp -rL), or fetch it with hf download --local-dir"
            )


def find_networks(folder: Path) -> list[tuple[str, str, str]]:
    """Return (family, sub-folder, class) of every network of a diffusers pipeline folder.

    Raises:
        ValueError: it is no such folder, or of a family that we do not know.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UsageError(
            f"{folder}: expected a diffusers pipeline folder, found no model_index.json; "
            "give one that DiffusionPipeline.save_pretrained wrote"
        )
    entries = json.loads(index.read_text())
    pipeline = entries.get("_class_name")
    if pipeline not in PIPELINES:
        raise UsageError(f"{index}: expected one of {', '.join(PIPELINES)}, got {pipeline!r}")
    return [
        (PIPELINES[pipeline], name, entry[1])
        for name, entry in entries.items()
        if (name.startswith("text_encoder") or name in ("unet", "transformer", "vae"))
        and entry[1] is not None
    ]


def load_network(folder: Path, network: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Open a network of a class of diffusers or transformers, in the dtype that it is stored in if None."""
    dtype = dtype or stored_dtype(read_places(folder))
    if hasattr(diffusers, network):
        model: Any = getattr(diffusers, network).from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True
        )
    else:
        model = getattr(transformers, network).from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def stored_dtype(places: Mapping[str, Place]) -> torch.dtype:
    """Return the floating dtype that most bytes of the tensors have."""
    bytes_of: dict[str, int] = {}
    for place in places.values():
        bytes_of[place.dtype] = bytes_of.get(place.dtype, 0) + place.length
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = max(bytes_of, key=lambda name: bytes_of[name])
    if found not in known:
        raise ValueError(f"expected weights in {', '.join(known)}, got {found}")
    return known[found]
