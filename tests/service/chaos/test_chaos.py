"""Workers and Valkey are killed at random in the middle of the work: nothing lost, nothing twice, equal bytes.

The long form: CHAOS_JOBS=2000 CHAOS_KILLS=30 pytest tests/service/chaos
"""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flashbulb_distill.bundle import open_bundle
from flashbulb_service.backends import ImageRequest
from flashbulb_service.backends.synthetic import draw
from flashbulb_service.embedded import EmbeddedServer
from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.images import encode_image
from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.provenance import Marker, Origin
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.tasks import ImageOutcome, ImageTask
from support.serving import FLASHBULB, clean_env
from support.tiny_bundle import make_tiny_bundle

NUM_JOBS = int(os.environ.get("CHAOS_JOBS", "100"))
NUM_KILLS = int(os.environ.get("CHAOS_KILLS", "6"))  # of workers; every third one takes Valkey along


def new_job(number: int) -> NewJob:
    task = ImageTask(prompt=f"p{number}", seed=number, index=0, width=64, height=64)
    return NewJob("tiny@1", "tiny@1:64x64:1", task.to_bytes(), max_attempts=20)


@pytest.mark.timeout(120 + NUM_JOBS // 2)
async def test_kills_at_random_lose_nothing_and_change_no_byte(
    tmp_path: Path, wait_until: Callable[..., object]
) -> None:
    sha256 = open_bundle(make_tiny_bundle(tmp_path / "models")).sha256
    draws = random.Random(1)
    with EmbeddedServer(tmp_path / "queue") as server:
        env = clean_env(
            redis=server.url,
            models=str(tmp_path / "models"),
            data=str(tmp_path),
            backend="synthetic",
            synthetic='{"floor_ms": 20, "base_ms": 20, "row_ms": 20}',
            lease_s="1",
            max_batch="4",
        )
        workers: list[subprocess.Popen[bytes]] = []

        def start() -> None:
            workers.append(subprocess.Popen([*FLASHBULB, "worker"], env=env, stderr=subprocess.DEVNULL))

        async with Queue.connect(server.url) as queue:
            ids = (await queue.enqueue([new_job(n) for n in range(NUM_JOBS)])).ids
            try:
                start()
                start()
                for kill in range(NUM_KILLS):
                    target = NUM_JOBS * (kill + 1) // (NUM_KILLS + 2)

                    async def reached(target: int = target) -> bool:
                        with contextlib.suppress(QueueUnavailable):
                            stats = await queue.stats()
                            live = sum(stats.queued.values()) + stats.running + stats.delayed
                            return NUM_JOBS - live >= target
                        return False

                    await wait_until(reached, 40.0)
                    victim = workers.pop(draws.randrange(len(workers)))
                    victim.kill()
                    victim.wait()
                    if kill % 3 == 2:  # Valkey as well; its supervisor starts it again on the same data
                        os.kill(server.pid, signal.SIGKILL)
                    start()
                async with asyncio.timeout(60):
                    while True:
                        with contextlib.suppress(QueueUnavailable):
                            views = await queue.wait(ids, 50)
                            break
            finally:
                for worker in workers:
                    worker.kill()
                    worker.wait()
            assert [view.state for view in views] == [JobState.DONE] * NUM_JOBS
    store = ResultStore((tmp_path / "results").as_uri(), ttl_s=3600)
    for number, view in enumerate(views):
        picture = await store.get(ImageOutcome.from_bytes(view.result or b"").file)
        pixels = draw(ImageRequest(f"p{number}", number, 0, 64, 64))
        calm = Marker().apply(encode_image(pixels, "png"), "png", Origin("tiny@1", sha256, number, 0))
        assert picture == calm
    assert len(list((tmp_path / "results").iterdir())) == NUM_JOBS
