"""From drawn pixels to files in the result store: check, encode, mark, write. Runs on threads of the pipeline."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from flashbulb_service.catalog import Model
from flashbulb_service.errors import without_frames
from flashbulb_service.formats import FileFormat
from flashbulb_service.images import encode_image
from flashbulb_service.provenance import Marker, Origin
from flashbulb_service.results import ResultStore, result_id, video_file
from flashbulb_service.safety import CODE as CONTENT_POLICY
from flashbulb_service.safety import ImageChecker, PictureHeldBack, check_picture
from flashbulb_service.tasks import ImageTask
from flashbulb_service.video import encode_spritesheet, encode_thumbnail, encode_video


class Undeliverable(Exception):
    """A picture gets no file: its job fails with a code, for a reason."""

    def __init__(self, code: str, reason: Exception, *, retry: bool) -> None:
        """Keep why, and whether another attempt may succeed."""
        super().__init__(code)
        self.code = code
        self.reason = without_frames(reason)
        self.retry = retry


@dataclass(frozen=True)
class Finished:
    """A picture or video as a file; stored already where the store is local."""

    file: str  # result id
    data: bytes
    encode_s: float
    store_s: float
    beside: Mapping[str, bytes] = field(default_factory=dict)  # result id -> other views of a video


class Finisher:
    """Makes files of pictures."""

    def __init__(self, results: ResultStore, marker: Marker, checker: ImageChecker | None) -> None:
        """Keep the parts."""
        self._results = results
        self._marker = marker
        self._checker = checker

    @property
    def is_local(self) -> bool:
        """Tell whether a finished picture is stored as well."""
        return self._results.is_local

    def prepare(self) -> None:
        """Get ready for the next picture, when nobody waits for this one any more."""
        self._results.prepare()

    def finish(self, model: Model, job_id: str, task: ImageTask, pixels: np.ndarray) -> Finished:
        """Do what `encode` and `store` do."""
        return self.store(self.encode(model, job_id, task, pixels))

    def encode(self, model: Model, job_id: str, task: ImageTask, pixels: np.ndarray) -> Finished:
        """Check, encode and mark a picture or video.

        Args:
            pixels: uint8 [h, w, 3], of a video [f, h, w, 3].

        Raises:
            Undeliverable: it is not allowed, or cannot be checked or encoded.
        """
        self._check(pixels)
        start = time.perf_counter()
        try:
            origin = Origin(model.id, model.bundle.sha256, task.seed, task.index, task.prompt)
            (file, data), *others = (
                (name, self._marker.apply(data, kind, origin))
                for name, kind, data in _encode(job_id, task, pixels)
            )
        except ImportError as error:
            raise Undeliverable("encoder_unavailable", error, retry=False) from error
        except Exception as error:
            raise Undeliverable("store_failed", error, retry=True) from error
        return Finished(file, data, time.perf_counter() - start, 0.0, dict(others))

    def store(self, finished: Finished) -> Finished:
        """Write a file where that takes no network.

        Raises:
            Undeliverable: it cannot be written.
        """
        if not self._results.is_local:
            return finished
        start = time.perf_counter()
        try:
            for name, data in reversed([(finished.file, finished.data), *finished.beside.items()]):
                self._results.write(name, data)  # the one that is announced last
        except Exception as error:
            raise Undeliverable("store_failed", error, retry=True) from error
        return replace(finished, store_s=time.perf_counter() - start)

    def _check(self, pixels: np.ndarray) -> None:
        try:
            for picture in pixels if pixels.ndim == 4 else [pixels]:
                check_picture(self._checker, picture)
        except PictureHeldBack as error:
            raise Undeliverable(CONTENT_POLICY, error, retry=False) from error
        except Exception as error:  # a checker may raise anything, and then it has not allowed it
            raise Undeliverable("safety_check_failed", error, retry=True) from error

    async def store_remotely(self, finished: Finished) -> Finished:
        """Put a file where that takes a network, and nowhere else; from the event loop.

        Raises:
            Undeliverable: the store refuses it.
        """
        if self._results.is_local:
            return finished
        start = time.perf_counter()
        try:
            for name, data in [*finished.beside.items(), (finished.file, finished.data)]:
                await self._results.put(name, data)
        except Exception as error:
            raise Undeliverable("store_failed", error, retry=True) from error
        return replace(finished, store_s=time.perf_counter() - start)


def _encode(job_id: str, task: ImageTask, pixels: np.ndarray) -> Iterator[tuple[str, FileFormat, bytes]]:
    """Yield (result id, format, content): the picture, or the video and then its other views."""
    if task.image_format != "mp4":
        yield (
            result_id(job_id, task.image_format),
            task.image_format,
            encode_image(pixels, task.image_format, task.quality),
        )
        return
    assert task.fps is not None
    yield video_file(job_id, "video"), "mp4", encode_video(pixels, task.fps)
    yield video_file(job_id, "thumbnail"), "webp", encode_thumbnail(pixels)
    yield video_file(job_id, "spritesheet"), "webp", encode_spritesheet(pixels)
