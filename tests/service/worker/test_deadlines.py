"""A deadline is of the finished, stored picture: what comes after drawing counts before it."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore


@pytest.mark.parametrize(("deadline_s", "state"), [(0.2, JobState.FAILED), (20.0, JobState.DONE)])
async def test_a_picture_that_could_not_be_stored_in_time_is_not_drawn(
    queue: Queue,
    start_worker: Callable[..., Any],
    watched: Any,
    results: ResultStore,
    picture_job: Callable[..., NewJob],
    monkeypatch: pytest.MonkeyPatch,
    deadline_s: float,
    state: JobState,
) -> None:
    write = results.write

    def slowly(name: str, data: bytes) -> None:
        time.sleep(0.3)
        write(name, data)

    monkeypatch.setattr(results, "write", slowly)
    start_worker()
    for _ in range(2):  # how long storing the first takes is learnt while the second one is drawn
        await queue.wait((await queue.enqueue([picture_job("dog")])).ids, 10)
    (view,) = await queue.wait((await queue.enqueue([picture_job("cat", deadline_s=deadline_s)])).ids, 10)
    assert view.state is state
    assert (["cat"] in watched.batches) == (state is JobState.DONE)
