"""Finished pictures as objects: one small key, bytes in, bytes out.

Any obstore location works (``file:///…``, ``s3://bucket/prefix``). Only ``file://`` stores are cleaned by us;
a bucket has lifecycle rules for that.
"""

import contextlib
import heapq
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlparse
from urllib.request import url2pathname

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from flashbulb_service.errors import InvalidRequest, ServerStartError
from flashbulb_service.formats import MEDIA_TYPES, FileFormat, VideoVariant

PART = ".part"  # ends the names of files that are being written
AT_ONCE = 1024  # files that cleaning keeps in mind: a folder may hold a million

# One path segment of safe characters: nothing that a file system or a URL could read as a direction.
_RESULT_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.(png|jpeg|webp|mp4)$")


def result_id(job_id: str, file_format: FileFormat) -> str:
    """Name the picture or video of a job.

    Raises:
        ValueError: the job id holds characters that are no part of a safe file name.
    """
    name = f"{job_id}.{file_format}"
    if not is_result_id(name):
        raise ValueError(f"expected a job id of letters, digits, '-' and '_', got {job_id!r}")
    return name


def video_file(job_id: str, variant: VideoVariant) -> str:
    """Name a view of the video of a job; raises as `result_id` does."""
    return result_id(job_id, "mp4") if variant == "video" else result_id(f"{job_id}-{variant}", "webp")


def is_result_id(name: str) -> bool:
    """Tell whether a name can be a result's; everything else is refused before a store sees it."""
    return _RESULT_ID.fullmatch(name) is not None


def media_type(name: str) -> str:
    """Return the media type of a result id."""
    return MEDIA_TYPES[name.rpartition(".")[2]]


@dataclass(frozen=True)
class _Part:
    """A file that has no name yet."""

    path: Path
    descriptor: int

    @classmethod
    def make(cls, folder: Path) -> Self:
        """Create it."""
        path = folder / f".{secrets.token_hex(8)}{PART}"
        return cls(path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))

    @property
    def is_there(self) -> bool:
        """Tell whether nobody has cleaned it away."""
        return os.fstat(self.descriptor).st_nlink > 0

    def fill(self, data: bytes) -> None:
        """Write all that it will hold, and close it."""
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self.descriptor, left) :]
        finally:
            os.close(self.descriptor)


class ResultStore:
    """Bytes by result id in an object store."""

    def __init__(self, location: str, *, ttl_s: float, max_bytes: int = 2 << 30) -> None:
        """Open the store at an obstore URL; a ``file://`` folder is created."""
        self.location = location
        self.ttl_s = ttl_s
        self.max_bytes = max_bytes
        self._folder: Path | None = None
        self._parts: deque[_Part] = deque()  # prepared; at most a few
        self._store: ObjectStore
        url = urlparse(location)
        if url.scheme == "file":
            self._folder = Path(url2pathname(url.path))
            make_private(self._folder)
            self._store = LocalStore(self._folder, mkdir=True)
        else:
            self._store = _open_bucket(location)

    @property
    def is_local(self) -> bool:
        """Tell whether a write is a matter of a file system, and so worth no thread or event of its own."""
        return self._folder is not None

    def write(self, name: str, data: bytes) -> None:
        """Write a picture from a thread; an equal name is replaced atomically (a retried job writes the same bytes).

        Raises:
            ValueError: the name is no result id.
        """
        if self._folder is None:
            obstore.put(self._store, _checked(name), data)
            return
        path = self._folder / _checked(name)
        part = self._take_part()
        try:
            part.fill(data)
            part.path.replace(path)
        except BaseException:
            part.path.unlink(missing_ok=True)
            raise

    def prepare(self) -> None:
        """Create the file that the next `write` fills, while nobody waits for it."""
        if self._folder is not None and not self._parts:
            self._parts.append(_Part.make(self._folder))

    def close(self) -> None:
        """Delete what was prepared and not needed."""
        while self._parts:
            part = self._parts.pop()
            os.close(part.descriptor)
            part.path.unlink(missing_ok=True)

    def _take_part(self) -> "_Part":
        assert self._folder is not None
        with contextlib.suppress(IndexError):
            part = self._parts.pop()
            if part.is_there:
                return part
            os.close(part.descriptor)
        return _Part.make(self._folder)

    async def put(self, name: str, data: bytes) -> None:
        """Write a picture from the event loop; otherwise as `write`."""
        await obstore.put_async(self._store, _checked(name), data)

    async def get(self, name: str) -> bytes | None:
        """Read a picture; None when there is none (never written, or its time is over)."""
        if not is_result_id(name):
            return None
        try:
            answer = await obstore.get_async(self._store, name)
            return bytes(await answer.bytes_async())
        except (NotFoundError, FileNotFoundError):
            return None

    async def size(self, name: str) -> int | None:
        """Return the bytes of a file; None when there is none."""
        if not is_result_id(name):
            return None
        try:
            return int((await obstore.head_async(self._store, name))["size"])
        except (NotFoundError, FileNotFoundError):
            return None

    async def get_part(self, name: str, start: int, end: int) -> bytes | None:
        """Read the bytes from start to before end, which must lie inside the file; None when there is none."""
        if not is_result_id(name):
            return None
        try:
            return bytes(await obstore.get_range_async(self._store, name, start=start, end=end))
        except (NotFoundError, FileNotFoundError):
            return None

    async def delete(self, names: Sequence[str]) -> None:
        """Delete files; those that are not there are none that is left."""
        for name in map(_checked, names):
            with contextlib.suppress(NotFoundError, FileNotFoundError):
                await obstore.delete_async(self._store, name)

    def clean(self, now: float | None = None) -> int:
        """Delete what is too old, then the oldest beyond `max_bytes`, in a ``file://`` store; return how many pictures.

        The folder is read as it comes; never more than `AT_ONCE` of its files are kept in mind.
        """
        if self._folder is None:
            return 0
        oldest = (time.time() if now is None else now) - self.ttl_s
        removed = 0
        while True:
            expired, kept_bytes, first = _sweep(self._folder, oldest)
            removed += expired
            for size, path in first:
                if kept_bytes <= self.max_bytes:
                    break
                with contextlib.suppress(FileNotFoundError):  # another worker cleaned it first
                    Path(path).unlink()
                    removed += 1
                kept_bytes -= size
            if kept_bytes <= self.max_bytes or not first:
                return removed


def _checked(name: str) -> str:
    if not is_result_id(name):
        raise ValueError(f"expected a result id such as '<job id>.png', got {name!r}")
    return name


def make_private(folder: Path) -> None:
    """Create a folder that others cannot look into; one that is there stays as it is.

    Raises:
        ServerStartError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ServerStartError(
            f"expected a folder that can be written at {folder}, got: {error.strerror}; "
            "choose another with --data or FLASHBULB_DATA"
        ) from error


def _open_bucket(location: str) -> ObjectStore:
    try:
        return from_url(location)
    except (BaseError, ValueError):  # obstore's own text is a dump of its structures
        scheme = urlparse(location).scheme
        raise InvalidRequest(
            "expected an object store such as file:///folder or s3://bucket/prefix in FLASHBULB_RESULTS_URL, "
            f"got one with the scheme {scheme!r} that cannot be opened: correct it",
            param="results_url",
        ) from None


def _sweep(folder: Path, oldest: float) -> tuple[int, int, list[tuple[int, str]]]:
    """Delete what was written before `oldest`.

    Returns:
        how many pictures that were, the bytes of those that are left, and (bytes, path) of the oldest of these.
    """
    expired = kept_bytes = 0
    first: list[tuple[float, int, str]] = []  # a heap, the newest on top
    with os.scandir(folder) as entries:
        for entry in entries:
            is_part = entry.name.startswith(".") and entry.name.endswith(PART)
            if not is_part and not is_result_id(entry.name):
                continue
            with contextlib.suppress(FileNotFoundError):  # another worker cleaned it first
                found = entry.stat()
                if found.st_mtime < oldest:
                    Path(entry.path).unlink()
                    expired += not is_part  # a part is of a worker that was killed while it wrote
                elif not is_part:
                    kept_bytes += found.st_size
                    add = heapq.heappush if len(first) < AT_ONCE else heapq.heappushpop
                    add(first, (-found.st_mtime, found.st_size, entry.path))
    return expired, kept_bytes, [(size, path) for _, size, path in sorted(first, reverse=True)]
