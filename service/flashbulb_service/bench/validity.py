"""Whether an answer holds the right pictures: a server that gets faster by changing pixels gains nothing.

With `reference`, every picture of the pool is asked for once beforehand, alone; later answers must have the same
pixels. With `decodable`, for servers that take no seed, an answer must hold n pictures of the size asked for.
"""

import base64
import binascii
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from flashbulb_service.bench.client import Sample
from flashbulb_service.bench.workload import Picture

Mode = Literal["reference", "decodable"]

_TIMING = re.compile(r"([\w-]+)\s*;[^,]*?\bdur=([0-9.]+)")


@dataclass(frozen=True)
class Drawn:
    """The pictures of one answer: hashes of the files, hashes of their pixels, and the sizes."""

    files: tuple[str, ...]
    pixels: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]


class UnreadableAnswer(ValueError):
    """An answer of status 200 that holds no pictures."""


def read_pictures(body: bytes) -> list[bytes]:
    """Return the files of an answer in OpenAI's shape.

    Raises:
        UnreadableAnswer: it has another shape.
    """
    try:
        return [base64.b64decode(item["b64_json"], validate=True) for item in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise UnreadableAnswer(
            f"expected data[].b64_json, got an answer that has none ({type(error).__name__})"
        ) from error


def draw_of(files: list[bytes]) -> Drawn:
    """Decode the files of an answer and hash them.

    Raises:
        UnreadableAnswer: one of them is no picture.
    """
    pixels, sizes = [], []
    for data in files:
        try:
            with Image.open(io.BytesIO(data)) as picture:
                raw = picture.convert("RGBA")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableAnswer(f"expected a picture, got {len(data)} bytes that are none") from error
        pixels.append(hashlib.sha256(raw.tobytes()).hexdigest())
        sizes.append(raw.size)
    return Drawn(tuple(hashlib.sha256(data).hexdigest() for data in files), tuple(pixels), tuple(sizes))


class Judge:
    """Decides about answers and reads what they tell about themselves; frees their bodies."""

    def __init__(self, mode: Mode, references: Mapping[Picture, Drawn]) -> None:
        """Judge by references, or by what can be decoded."""
        self.mode = mode
        self.references = references

    def __call__(self, sample: Sample) -> None:
        """Judge one sample, once."""
        body, sample.body = sample.body, None
        if body is None:
            return
        if not sample.answered:
            sample.error = _error_code(body) or f"http_{sample.status}"
            return
        sample.timings, sample.batch_size = read_timings(body, sample.server_timing)
        try:
            files = read_pictures(body)
            sample.valid = self._right(sample.planned.picture, files)
        except UnreadableAnswer:
            sample.error = "unreadable_answer"
            return
        if not sample.valid:
            sample.error = "wrong_pixels" if self.mode == "reference" else "wrong_size"

    def _right(self, picture: Picture, files: list[bytes]) -> bool:
        if self.mode == "reference":
            wanted = self.references[picture]
            # Equal files have equal pixels; files may differ (a time in the metadata) where pixels do not.
            hashes = tuple(hashlib.sha256(data).hexdigest() for data in files)
            return hashes == wanted.files or draw_of(files).pixels == wanted.pixels
        sizes = draw_of(files).sizes
        return len(sizes) == picture.n and all(_fits(size, picture.size) for size in sizes)


def read_timings(body: bytes, header: str | None) -> tuple[dict[str, float] | None, int | None]:
    """Return what a server tells about an answer: milliseconds by part (`queue_ms`), and the batch's size."""
    try:
        told: Any = json.loads(body)
    except ValueError:
        told = {}
    told = told if isinstance(told, dict) else {}
    timings = told.get("timings")
    if isinstance(timings, dict):
        found = {str(name): float(ms) for name, ms in timings.items() if isinstance(ms, int | float)}
    else:
        found = {f"{name}_ms": float(ms) for name, ms in _TIMING.findall(header or "")}
    size = told.get("batch_size")
    return found or None, size if isinstance(size, int) else None


def _fits(size: tuple[int, int], wanted: str | None) -> bool:
    return wanted in (None, "auto") or f"{size[0]}x{size[1]}" == wanted


def _error_code(body: bytes) -> str | None:
    """Return the code of an error in OpenAI's envelope."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code[:100] if isinstance(code, str) else None
