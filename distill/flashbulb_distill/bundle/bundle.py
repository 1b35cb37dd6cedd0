"""Open, verify and write student bundles: a folder with manifest.json and the files that it names."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from .errors import BundleError
from .manifest import SCHEMA_VERSION, File, Manifest

MANIFEST = "manifest.json"
ENGINES = "engines"  # each folder in it has a manifest of its own, see engines.py
_MAX_MANIFEST_BYTES = 4 << 20

# Name, bytes and time of change (ns) of all that lies in a folder.
Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A student whose manifest was read; `sha256` is that of manifest.json, which hashes every other file."""

    path: Path
    manifest: Manifest
    sha256: str
    # What lay there just before the hashes were checked; None: they were not.
    verified: Fingerprint | None = field(default=None, compare=False, repr=False)

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest names."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: expected {name} among the manifest's files, found no such entry")
        return self.path / name


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits, in bounded memory."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def open_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Read a bundle's manifest and, with `verify`, check the hash of every file that it names.

    Raises:
        BundleError: the folder, a file or the manifest is missing, damaged, or of another schema version.
    """
    path = Path(path)
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise BundleError(
            f"{path}: expected a student bundle, found no {MANIFEST}; give a folder like models/emoji/1"
        )
    if manifest_path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{manifest_path}: expected at most {_MAX_MANIFEST_BYTES} bytes; the file is damaged"
        )
    verified = fingerprint(path) if verify else None
    data = manifest_path.read_bytes()
    manifest = _parse(manifest_path, data)
    if verify:
        _verify_files(path, manifest)
    return Bundle(path, manifest, hashlib.sha256(data).hexdigest(), verified)


def check_unchanged(bundle: Bundle) -> None:
    """Check that a folder still holds a bundle; its files are read only if one was touched since they were verified.

    Raises:
        BundleError: it was replaced or damaged.
    """
    if fingerprint(bundle.path) == bundle.verified and hash_file(bundle.path / MANIFEST) == bundle.sha256:
        return
    found = open_bundle(bundle.path).sha256
    if found != bundle.sha256:
        raise BundleError(
            f"{bundle.path}: expected the bundle {bundle.sha256[:12]} that was opened before, got {found[:12]}; "
            "export a changed student under a new version"
        )


def fingerprint(folder: Path) -> Fingerprint:
    """Return what changes when a file of a folder is replaced; no file is read."""
    entries = []
    for file in sorted(folder.rglob("*")):
        try:
            stat = file.stat()
        except FileNotFoundError:  # being removed
            continue
        entries.append((file.name, stat.st_size, stat.st_mtime_ns))
    return tuple(entries)


def _parse(path: Path, data: bytes) -> Manifest:
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise BundleError(f"{path}: expected JSON, got {error}; restore the bundle") from error
    found = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(found, bool) or found not in (1, SCHEMA_VERSION):
        raise BundleError(
            f"{path}: expected schema_version 1 or {SCHEMA_VERSION}, got {found!r}; "
            "export the student again with this version of flashbulb, or use the version that wrote it"
        )
    same_text = _text(raw).encode() == data  # byte for byte, so that no flipped byte goes unseen
    if raw.pop("manifest_sha256", None) != manifest_digest(raw) or not same_text:
        raise BundleError(
            f"{path}: expected manifest_sha256 to match its content; the file was changed or damaged"
        )
    try:
        return Manifest.model_validate_json(json.dumps(_from_version_1(raw) if found == 1 else raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"{path}: {where}: {first['msg']}; export the student again") from error


def _from_version_1(fields: dict[str, object]) -> dict[str, object]:
    """Read a manifest of schema version 1, which knew one text encoder; the file stays as it is."""
    return fields | {"schema_version": SCHEMA_VERSION, "text": [fields.get("text")]}


def _text(fields: dict[str, object]) -> str:
    return json.dumps(fields, indent=2) + "\n"


def manifest_digest(fields: dict[str, object]) -> str:
    """Return the sha256 of the manifest's fields in canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _verify_files(path: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise BundleError(f"{file}: expected by the manifest, not found; restore the bundle")
        size = file.stat().st_size
        if size != expected.bytes:
            raise BundleError(f"{file}: expected {expected.bytes} bytes, got {size}; restore the bundle")
        digest = hash_file(file)
        if digest != expected.sha256:
            raise BundleError(f"{file}: expected sha256 {expected.sha256}, got {digest}; restore the bundle")
    for stranger in _strangers(path, manifest):
        raise BundleError(f"{stranger}: expected only files that the manifest names; remove it")


def _strangers(path: Path, manifest: Manifest) -> Iterator[Path]:
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if name.startswith(f"{ENGINES}/"):
            continue
        if file.is_file() and name != MANIFEST and name not in manifest.files:
            yield file


def describe_files(path: Path) -> dict[str, File]:
    """Return the manifest entry of every file under a folder except the manifest itself."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != path / MANIFEST:
            files[file.relative_to(path).as_posix()] = File(sha256=hash_file(file), bytes=file.stat().st_size)
    return files


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write manifest.json into a bundle folder, atomically."""
    fields = json.loads(manifest.model_dump_json())
    fields["manifest_sha256"] = manifest_digest(fields)
    temporary = path / f".{MANIFEST}.tmp"
    temporary.write_text(_text(fields))
    temporary.replace(path / MANIFEST)


def list_models(models: Path) -> list[tuple[str, int, Path]]:
    """Return (name, version, path) of every bundle under a model repository, sorted."""
    found = []
    for manifest in sorted(Path(models).glob(f"*/*/{MANIFEST}")):
        version = manifest.parent.name
        if re.fullmatch(r"[1-9][0-9]*", version):
            found.append((manifest.parent.parent.name, int(version), manifest.parent))
    return sorted(found)


def find_model(models: Path, reference: str) -> Path:
    """Return the folder of "name" (its latest version) or "name@version" in a model repository.

    Raises:
        BundleError: no such model; the message lists those that there are.
    """
    name, _, version = reference.partition("@")
    known = list_models(models)
    matches = [path for n, v, path in known if n == name and version in ("", str(v))]
    if not matches:
        have = ", ".join(f"{n}@{v}" for n, v, _ in known) or "none"
        raise BundleError(f"model {reference!r}: not found in {models}; it holds: {have}")
    return matches[-1]
