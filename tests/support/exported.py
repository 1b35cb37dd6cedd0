"""Graphs of the tiny families: each is traced once in a test run, whichever process needs it first."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from flashbulb_distill.export.families import Component, components_of, variants
from flashbulb_distill.export.graph import content_hash
from flashbulb_distill.export.pipeline import export_component
from support.tiny_families import make_tiny_family

PIPELINES = {
    "sdxl": "sdxl",
    "sd3": "sd3",
    "sd35": "sd3",
    "cogvideox-2b": "cogvideox",
    "cogvideox-5b": "cogvideox",
}
# Each kind of network once: what other families have besides is the same class with the same flags.
COMPONENTS = [
    *(("sdxl", name) for name in ("text_encoder", "text_encoder_2", "unet", "vae_decoder")),
    *(("sd3", name) for name in ("text_encoder_3", "transformer", "vae_decoder")),
    ("sd35", "transformer"),
    ("cogvideox-2b", "transformer"),
    *(("cogvideox-5b", name) for name in ("transformer", "vae_decoder")),
]


@dataclass(frozen=True)
class Exported:
    """A graph on disk, and the component that it was made from."""

    path: Path
    component: Component

    @property
    def cases(self) -> list[Mapping[str, Tensor]]:
        """Inputs of several sizes, most of them not the traced one."""
        return [*variants(self.component)]


def find(family: str, name: str, dtype: torch.dtype = torch.float32) -> Component:
    """Return a component of a tiny family."""
    parts = {part: network.to(dtype) for part, network in make_tiny_family(family).items()}
    return next(one for one in components_of(PIPELINES[family], parts) if one.name == name)


@lru_cache(maxsize=64)
def export_tiny(family: str, name: str, *, opset: int = 18, dtype: torch.dtype = torch.float32) -> Exported:
    """Export a component of a tiny family with random weights. Graphs are kept between runs, by content."""
    root = Path(tempfile.gettempdir()) / f"flashbulb-graphs-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    component = find(family, name, dtype)
    folder = Path(tempfile.mkdtemp(prefix="export-"))
    with FileLock(root / f"{content_hash(component, opset)}.lock"):
        return Exported(export_component(component, folder / name, opset=opset, cache=root), component)
