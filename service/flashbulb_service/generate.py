"""Pictures and videos with no server: a bundle, a backend, files."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashbulb_distill.bundle import Bundle, BundleError, find_model, list_models, open_bundle
from flashbulb_service.backends import ImageRequest, Student
from flashbulb_service.errors import BundleRejected, InvalidRequest, UnknownModel
from flashbulb_service.formats import FileFormat
from flashbulb_service.images import encode_image
from flashbulb_service.provenance import Marker, Origin
from flashbulb_service.scheduler import in_chunks
from flashbulb_service.tasks import Task
from flashbulb_service.video import encode_animation, encode_video

_SUFFIXES: dict[str, FileFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".mp4": "mp4",
}


@dataclass(frozen=True)
class Report:
    """What was written, and how long the model took."""

    files: tuple[Path, ...]
    model_ms: float


def resolve_bundle(models_dir: Path, reference: str, *, verify: bool) -> Bundle:
    """Open "name", "name@version" of a repository, or the folder of a bundle.

    Raises:
        UnknownModel: the repository has none of that name.
        BundleRejected: there is no repository or folder, or the bundle is damaged.
    """
    try:
        is_folder = os.sep in reference or (Path(reference) / "manifest.json").is_file()
        if is_folder:
            return open_bundle(Path(reference), verify=verify)
        known = list_models(models_dir)
        names = dict.fromkeys([n for n, _, _ in known] + [f"{n}@{v}" for n, v, _ in known])
        if reference not in names:
            raise UnknownModel(reference, list(names))
        return open_bundle(find_model(models_dir, reference), verify=verify)
    except BundleError as error:
        raise BundleRejected(str(error)) from error


def choose_format(out: Path) -> FileFormat:
    """Return the format that a file name asks for.

    Raises:
        InvalidRequest: it asks for none that is offered.
    """
    if out.is_dir():
        raise InvalidRequest(
            f"expected a file name, got the folder {str(out)!r}: add a name to it", param="-o"
        )
    if out.suffix.lower() not in _SUFFIXES:
        raise InvalidRequest(
            f"expected a file name ending in {', '.join(_SUFFIXES)}, got {out.name!r}", param="-o"
        )
    return _SUFFIXES[out.suffix.lower()]


def task_of(file_format: FileFormat) -> Task | None:
    """Return what a format is of; None where it may be either: WebP holds pictures and moving ones."""
    return {"mp4": "text-to-video", "webp": None}.get(file_format, "text-to-image")


def file_names(out: Path, count: int) -> tuple[Path, ...]:
    """Name the files: `a.png`, or `a-0.png`, `a-1.png`, … for several."""
    if count == 1:
        return (out,)
    return tuple(out.with_name(f"{out.stem}-{index}{out.suffix}") for index in range(count))


def write_pictures(
    student: Student,
    bundle: Bundle,
    prompt: str,
    out: Path,
    *,
    seed: int,
    size: tuple[int, int],
    count: int,
    marker: Marker | None = None,
) -> Report:
    """Draw pictures or videos and write them; each file appears whole or not at all.

    Number i is drawn from (seed, i) and marked as the server does it. A video is the first that the student offers of
    this size; as .webp it moves as well.

    Raises:
        InvalidRequest: the student does not make what the file is of.
        ImportError: videos cannot be written here.
        OSError: the folder of `out` is missing or not writable.
    """
    file_format, manifest = choose_format(out), bundle.manifest
    if task_of(file_format) not in (None, manifest.task):
        made = "videos: expected a file name ending in .mp4 or .webp"
        made = made if manifest.is_video else "pictures: expected a file name ending in .png, .jpg or .webp"
        raise InvalidRequest(f"{manifest.name} makes {made}, got {out.name!r}", param="-o")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"expected the folder {out.parent} to exist: create it, or choose another -o")
    start = time.perf_counter()
    shape = next(one for one in manifest.shapes if (one.width, one.height) == size)
    requests = [ImageRequest(prompt, seed, index, *size, frames=shape.frames) for index in range(count)]
    pictures = [
        picture for chunk in in_chunks(requests, manifest.max_batch) for picture in student.generate(chunk)
    ]
    model_ms = (time.perf_counter() - start) * 1000
    files = file_names(out, count)
    marker = marker or Marker()
    name = f"{manifest.name}@{manifest.version}"
    origins = [Origin(name, bundle.sha256, seed, index, prompt) for index in range(count)]
    _write_all(
        files,
        [
            marker.apply(_encode(picture, file_format, manifest.fps), file_format, origin)
            for picture, origin in zip(pictures, origins, strict=True)
        ],
    )
    return Report(files, model_ms)


def _encode(pixels: np.ndarray, file_format: FileFormat, fps: float | None) -> bytes:
    """Encode a picture, or with fps a video."""
    if fps is not None:
        return encode_video(pixels, fps) if file_format == "mp4" else encode_animation(pixels, fps)
    assert file_format != "mp4"
    return encode_image(pixels, file_format)


def _write_all(files: Sequence[Path], contents: Sequence[bytes]) -> None:
    drafts: list[Path] = []
    try:
        for file, data in zip(files, contents, strict=True):
            handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
            drafts.append(Path(name))
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            drafts[-1].chmod(0o666 & ~_umask())
        for draft, file in zip(drafts, files, strict=True):
            draft.replace(file)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
