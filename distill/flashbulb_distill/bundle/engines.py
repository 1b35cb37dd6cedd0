"""Engines built from a bundle's graphs: `engines/<target>/`, each folder with a manifest of its own.

A bundle's own manifest never changes, so engines are added beside it. What ties the two together is the hash of the
bundle: an engine of another bundle, runtime or GPU is refused before anything is loaded.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from .bundle import ENGINES, hash_file
from .errors import BundleError
from .manifest import File, Sha256, Strict

ENGINE_MANIFEST = "engine.json"

Flavor = Literal["rtx", "standard"]


class Profile(Strict):
    """The shapes of one input in one bucket: an engine takes everything between `smallest` and `largest`."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]


class Engine(Strict):
    """One component's engine, and what it was built from and for."""

    file: str = Field(pattern=r"^[a-z0-9_]+\.engine$")
    sha256: Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)
    graph: str
    profiles: tuple[dict[str, Profile], ...] = Field(min_length=1)
    build_s: float = Field(ge=0)


class EngineManifest(Strict):
    """Everything that must agree before an engine of this folder may run.

    Attributes:
        bundle_sha256: of the manifest.json of the bundle that the graphs came from.
        runtime_version: of TensorRT, whole; engines of another version are refused.
        targets: compute capabilities, such as sm_89.
        gpu: the name of the one GPU for which a standard engine was tuned; None for RTX, which finishes on any target.
    """

    schema_version: Literal[1]
    flavor: Flavor
    runtime_version: str
    targets: tuple[str, ...] = Field(min_length=1)
    gpu: str | None
    bundle_sha256: Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
    shapes: tuple[tuple[int, int], ...] = Field(min_length=1)
    max_batch: int = Field(ge=1)
    engines: dict[str, Engine]


def engine_folder(
    bundle: Path, flavor: Flavor, targets: tuple[str, ...], version: str, gpu: str | None
) -> Path:
    """Return the folder of such engines, as in engines/rtx-1.7.1.116-sm_86-sm_89."""
    parts = [flavor, version, *targets]
    if gpu is not None:
        parts.append("-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split()))
    return bundle / ENGINES / "-".join(parts)


def write_engine_manifest(folder: Path, manifest: EngineManifest) -> None:
    """Write engine.json, last of a folder's files."""
    (folder / ENGINE_MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def read_engine_manifest(folder: Path) -> EngineManifest:
    """Read engine.json of a folder; its engines are not read.

    Raises:
        BundleError: it is missing, damaged, or of another schema version.
    """
    path = folder / ENGINE_MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder}: expected engines, found no {ENGINE_MANIFEST}; build them again")
    try:
        return EngineManifest.model_validate_json(path.read_text())
    except (ValidationError, ValueError, json.JSONDecodeError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise BundleError(f"{path}: {first}; build the engines again") from error


def list_engines(bundle: Path, flavor: Flavor | None = None) -> list[tuple[Path, EngineManifest]]:
    """Return the folder and manifest of every set of engines of a bundle, sorted by name."""
    folders = sorted(path.parent for path in (bundle / ENGINES).glob(f"*/{ENGINE_MANIFEST}"))
    found = [(folder, read_engine_manifest(folder)) for folder in folders]
    return [(folder, manifest) for folder, manifest in found if flavor in (None, manifest.flavor)]


def engine_file(folder: Path, engine: Engine) -> Path:
    """Return an engine's file after checking its size and hash.

    Raises:
        BundleError: the file is missing or is not what the manifest says.
    """
    path = folder / engine.file
    if not path.is_file():
        raise BundleError(f"{path}: expected by {ENGINE_MANIFEST}, not found; build the engines again")
    found = File(sha256=hash_file(path), bytes=path.stat().st_size)
    if (found.sha256, found.bytes) != (engine.sha256, engine.bytes):
        raise BundleError(
            f"{path}: expected sha256 {engine.sha256}, got {found.sha256}; build the engines again"
        )
    return path


def refusal(
    manifest: EngineManifest, *, bundle_sha256: str, runtime_version: str, capability: str, gpu: str
) -> str | None:
    """Say in one line why engines must not run here; None if they may.

    Args:
        capability: of the GPU at hand, such as sm_89; gpu: its name.
    """
    if manifest.bundle_sha256 != bundle_sha256:
        return f"expected engines of bundle {bundle_sha256[:12]}, got those of {manifest.bundle_sha256[:12]}"
    if manifest.runtime_version != runtime_version:
        return f"expected engines of TensorRT {runtime_version}, got those of {manifest.runtime_version}"
    if capability not in manifest.targets:
        return f"expected engines for {capability}, got those for {', '.join(manifest.targets)}"
    if manifest.gpu is not None and manifest.gpu != gpu:
        return f"expected engines tuned on {gpu}, got those tuned on {manifest.gpu}"
    return None
