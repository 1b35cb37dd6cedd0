"""Stopping real processes: readiness goes first, what was begun is finished, nothing is lost."""

import asyncio
import re
import signal
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx2
import pytest

from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.queue import Queue
from flashbulb_service.tasks import ImageTask
from support.serving import FLASHBULB, clean_env
from support.tiny_bundle import make_tiny_bundle

WaitUntil = Callable[..., Awaitable[None]]
NUM_JOBS = 1_000  # more than a worker draws before it hears that it shall stop


@pytest.fixture
def env(redis_url: str, namespace: str, tmp_path: Path) -> dict[str, str]:
    make_tiny_bundle(tmp_path / "models")
    return clean_env(
        redis=redis_url,
        namespace=namespace,
        models=str(tmp_path / "models"),
        data=str(tmp_path),
        threads="1",
        max_batch="2",
        drain_notice_s="3",
    )


def start(env: dict[str, str], *command: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen([*FLASHBULB, *command], env=env, stderr=stderr, text=True)


async def test_a_stopping_api_is_not_ready_first_and_finishes_what_it_has(
    queue: Queue, env: dict[str, str], wait_until: WaitUntil
) -> None:
    """Its request waits for a worker that starts only after the API was told to stop."""
    api = start(env, "api", "--port", "0", stderr=subprocess.PIPE)
    worker = None
    try:
        assert api.stderr is not None
        found = re.search(r"API on (http://\S+)", await asyncio.to_thread(api.stderr.readline))
        assert found is not None
        async with httpx2.AsyncClient(base_url=found[1], timeout=30) as client:

            async def alive() -> bool:
                try:
                    return (await client.get("/livez")).status_code == 200
                except httpx2.TransportError:
                    return False

            async def queued() -> bool:
                return sum((await queue.stats()).queued.values()) == 2

            async def stopping() -> bool:
                answer = await client.get("/readyz")
                return answer.status_code == 503 and "stopping" in answer.json()["error"]["message"]

            await wait_until(alive, 20)
            body = {"prompt": "dog", "n": 2}
            request = asyncio.create_task(client.post("/v1/images/generations", json=body))
            await wait_until(queued)
            api.send_signal(signal.SIGTERM)
            await wait_until(stopping)
            worker = start(env, "worker")
            answer = await request
            assert answer.status_code == 200 and len(answer.json()["data"]) == 2
        assert await asyncio.to_thread(api.wait, 20) == 0
    finally:
        for process in (api, worker):
            if process is not None:
                process.terminate()
                process.communicate(timeout=20)


async def test_a_worker_that_is_stopped_under_load_loses_nothing(
    queue: Queue, env: dict[str, str], wait_until: WaitUntil
) -> None:
    """No job waits for a lease to end: the stopped worker's were finished or handed back, at no attempt."""
    tasks = [ImageTask(prompt="dog", seed=seed, index=0, width=64, height=64) for seed in range(NUM_JOBS)]
    jobs = [NewJob(model="tiny@1", bucket="tiny@1:64x64:1", payload=task.to_bytes()) for task in tasks]
    ids = (await queue.enqueue(jobs)).ids

    async def half_way() -> bool:
        return sum((await queue.stats()).queued.values()) < NUM_JOBS - 10

    first = start(env, "worker")
    try:
        await wait_until(half_way, 20)
    finally:
        first.terminate()
        code = await asyncio.to_thread(first.wait, 20)
    assert code == 0
    stats = await queue.stats()
    assert stats.running == stats.delayed == 0
    assert sum(stats.queued.values()) > 0
    second = start(env, "worker")
    try:
        views = await queue.wait(ids, 30)
    finally:
        second.terminate()
        await asyncio.to_thread(second.wait, 20)
    assert [(view.state, view.attempt) for view in views] == [(JobState.DONE, 1)] * NUM_JOBS
