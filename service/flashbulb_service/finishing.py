"""From drawn pixels to a file in the result store: check, encode, mark, write. Runs on threads of the pipeline."""

import time
from dataclasses import dataclass

import numpy as np

from flashbulb_service.catalog import Model
from flashbulb_service.images import encode_image
from flashbulb_service.provenance import Marker, Origin
from flashbulb_service.results import ResultStore, result_id
from flashbulb_service.safety import CODE as CONTENT_POLICY
from flashbulb_service.safety import ImageChecker, PictureHeldBack, check_picture
from flashbulb_service.tasks import ImageTask


class Undeliverable(Exception):
    """A picture gets no file: its job fails with a code, for a reason."""

    def __init__(self, code: str, reason: Exception, *, retry: bool) -> None:
        """Keep why, and whether another attempt may succeed."""
        super().__init__(code)
        self.code = code
        self.reason = reason
        self.retry = retry


@dataclass(frozen=True)
class Finished:
    """A picture as a file; stored already where the store is local."""

    file: str  # result id
    data: bytes
    encode_s: float
    store_s: float


class Finisher:
    """Makes files of pictures."""

    def __init__(self, results: ResultStore, marker: Marker, checker: ImageChecker | None) -> None:
        """Keep the parts."""
        self._results = results
        self._marker = marker
        self._checker = checker

    def finish(self, model: Model, job_id: str, task: ImageTask, pixels: np.ndarray) -> Finished:
        """Check and encode a picture, and write it where that takes no network: pixels uint8 [h, w, 3].

        Raises:
            Undeliverable: it is not allowed, or cannot be checked, encoded or written.
        """
        self._check(pixels)
        start = time.perf_counter()
        try:
            file = result_id(job_id, task.image_format)
            origin = Origin(model.id, model.bundle.sha256, task.seed, task.index, task.prompt)
            data = encode_image(pixels, task.image_format, task.quality)
            data = self._marker.apply(data, task.image_format, origin)
            encoded = time.perf_counter()
            if self._results.is_local:
                self._results.write(file, data)
        except Exception as error:
            raise Undeliverable("store_failed", error, retry=True) from error
        return Finished(file, data, encoded - start, time.perf_counter() - encoded)

    def _check(self, pixels: np.ndarray) -> None:
        try:
            check_picture(self._checker, pixels)
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
            await self._results.put(finished.file, finished.data)
        except Exception as error:
            raise Undeliverable("store_failed", error, retry=True) from error
        return Finished(finished.file, finished.data, finished.encode_s, time.perf_counter() - start)
