"""A worker that dies without a word: nothing is lost, nothing is done twice."""

import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

from flashbulb_service.jobs import JobState, JobView, NewJob
from flashbulb_service.queue import Queue
from support.serving import FLASHBULB, clean_env

WaitUntil = Callable[..., Awaitable[None]]


async def test_killed_worker_in_the_middle_of_200_jobs(
    queue: Queue,
    redis_url: str,
    namespace: str,
    models_dir: Path,
    tmp_path: Path,
    picture_job: Callable[..., NewJob],
    wait_until: WaitUntil,
) -> None:
    """200 finished, none twice: what stood when the worker died stands unchanged, the rest is done once."""
    env = clean_env(
        redis=redis_url,
        namespace=namespace,
        models=str(models_dir),
        data=str(tmp_path),
        lease_s="1",
        max_batch="4",
        threads="1",
    )

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*FLASHBULB, "worker"], env=env, stderr=subprocess.DEVNULL)

    ids = (await queue.enqueue([picture_job(seed=seed) for seed in range(200)])).ids
    first = start()

    async def caught_in_the_middle() -> bool:
        stats = await queue.stats()
        if not stats.running or sum(stats.queued.values()) > 180:
            return False
        os.kill(first.pid, signal.SIGSTOP)  # look while it cannot move
        stats = await queue.stats()
        if stats.running:
            return True
        os.kill(first.pid, signal.SIGCONT)
        return False

    try:
        await wait_until(caught_in_the_middle, 40.0)  # a busy machine takes long to start a worker
        stats = await queue.stats()
        # Four batches of four at most: two being drawn, two being delivered.
        assert 1 <= stats.running <= 16 and sum(stats.queued.values()) > 10
    finally:
        first.kill()
        first.wait()
    before = {view.id: view for view in await _views(queue, ids) if view.state is JobState.DONE}
    assert before

    second = start()
    try:
        after = await queue.wait(ids, 30)
    finally:
        second.terminate()
        assert second.wait(20) == 0
    assert [view.state for view in after] == [JobState.DONE] * 200
    assert {view.id: view for view in after if view.id in before} == before
    assert sum(view.attempt > 1 for view in after) >= stats.running
    assert len(list((tmp_path / "results").glob("*.png"))) == 200  # beside what the killed one began to write


async def _views(queue: Queue, ids: tuple[str, ...]) -> list[JobView]:
    views = [await queue.get(job_id) for job_id in ids]
    return [view for view in views if view is not None]
