"""Videos and pictures on one live worker whose device sleeps: what a picture waits, and what a killed worker leaves."""

import asyncio
import random
import statistics
import subprocess
import time

import pytest

from flashbulb_service.backends import Student
from flashbulb_service.backends.synthetic import SyntheticBackend, SyntheticDevice
from flashbulb_service.catalog import Model
from flashbulb_service.jobs import JobState
from flashbulb_service.model_pool import LoadedModel, ModelPool
from flashbulb_service.presence import Presence
from flashbulb_service.queue import Kept
from flashbulb_service.results import ResultStore
from flashbulb_service.tasks import StepDone
from flashbulb_service.worker import Worker
from support.serving import FLASHBULB, clean_env
from support.tiny_bundle import FRAMES

STEPS = 4
# Slow enough that a busy machine's own delays are small beside it.
DEVICE = SyntheticDevice(floor_ms=300, base_ms=60, row_ms=75, frame_ms=45)
STEP_MS = FRAMES * DEVICE.frame_ms + 300 / STEPS  # 345 of one row
CAP = 8
CAPACITY = 1000 * CAP / (60 + 75 * CAP)  # 12 pictures a second
NOISE_MS = 150


@pytest.fixture
async def synthetic(make_queue, redis_url, namespace, bundles, tmp_path):
    """A queue whose worker runs both students on one kind of device that sleeps."""
    presence = Presence.connect(redis_url, namespace=namespace)
    models = []
    for name, bundle in bundles.items():
        backend = SyntheticBackend(DEVICE)
        backend.load(bundle)
        models.append(LoadedModel(Model(name, 1, bundle), Student(backend), 1 if "video" in name else CAP))
    results = ResultStore((tmp_path / "results").as_uri(), ttl_s=3600)
    pool, stop = ModelPool.holding(models), asyncio.Event()
    worker = Worker(make_queue(), results, presence, pool, backend_name="synthetic", lease_s=10)
    running = asyncio.create_task(worker.run(stop, drain_s=1))
    yield make_queue()
    stop.set()
    await running
    await presence.aclose()


async def p90_ms(queue, image_job, count):
    """The 90 % point of the latency of pictures that come at half the capacity, by the queue's clock."""
    draw, ids = random.Random(1), []
    for seed in range(count):
        ids += (await queue.enqueue([image_job(seed=seed)])).ids
        await asyncio.sleep(draw.expovariate(0.5 * CAPACITY))
    views = await queue.wait(ids, 60)
    assert {view.state for view in views} == {JobState.DONE}
    return statistics.quantiles([(view.finished_at - view.enqueued_at) * 1000 for view in views], n=10)[8]


async def test_videos_back_to_back_keep_a_picture_by_no_more_than_a_step(synthetic, image_job, video_job):
    await p90_ms(synthetic, image_job, 8)  # times are learnt
    for _ in range(2):  # a busy machine only ever adds
        alone = await p90_ms(synthetic, image_job, 30)
        videos = (await synthetic.enqueue([video_job(seed=seed) for seed in range(20)])).ids
        beside = await p90_ms(synthetic, image_job, 30)
        told = await synthetic.last_step(videos[0])
        for job_id in videos:
            await synthetic.cancel(job_id)
        assert told is not None and StepDone.from_bytes(told.encode()).step >= 2, "videos go on meanwhile"
        if beside <= alone + STEP_MS + NOISE_MS:
            break
    else:
        pytest.fail(f"p90 of pictures: {alone:.0f} ms alone, {beside:.0f} ms beside videos")
    assert STEPS * STEP_MS > STEP_MS + NOISE_MS + 500, "a whole video would be seen"


async def test_a_video_whose_worker_is_killed_is_made_again_once(
    queue, redis_url, namespace, models_dir, tmp_path, video_job, wait_until
):
    env = clean_env(
        redis=redis_url,
        namespace=namespace,
        models=str(models_dir),
        data=str(tmp_path),
        lease_s="1",
        max_batch="1",
        backend="synthetic",
        synthetic='{"floor_ms": 1, "base_ms": 1, "row_ms": 0, "frame_ms": 40}',
    )

    def start():
        return subprocess.Popen([*FLASHBULB, "worker"], env=env, stderr=subprocess.DEVNULL)

    kept = Kept(record=b"{}", owner="me", events=True)
    (job_id,) = (await queue.enqueue([video_job()], keep=kept)).ids
    first = start()
    try:

        async def in_the_middle():
            return await queue.last_step(job_id) == '{"step":2,"steps":4}'

        await wait_until(in_the_middle, 40.0)
    finally:
        first.kill()
        first.wait()
    second = start()
    try:
        (view,) = await queue.wait([job_id], 40)
    finally:
        second.terminate()
        assert second.wait(20) == 0
    assert (view.state, view.attempt) == (JobState.DONE, 2)
    kinds = [event.kind for event in await queue.past_events(job_id, after="0")]
    assert kinds == [
        "queued", "running", "progress", "progress",
        "queued", "running", "progress", "progress", "progress", "progress", "done",
    ]  # fmt: skip
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == [
        f"{job_id}-spritesheet.webp", f"{job_id}-thumbnail.webp", f"{job_id}.mp4",
    ]  # fmt: skip


async def test_a_cancelled_video_leaves_a_live_device_within_a_step(synthetic, video_job, wait_until):
    first, second = (await synthetic.enqueue([video_job(seed=seed) for seed in (1, 2)])).ids

    async def is_running():
        return (await synthetic.get(first)).state is JobState.RUNNING

    await wait_until(is_running)
    start = time.monotonic()
    await synthetic.cancel(first)

    async def other_runs():
        return (await synthetic.get(second)).state is JobState.RUNNING

    await wait_until(other_runs)
    assert time.monotonic() - start < (STEP_MS + NOISE_MS) / 1000
    await synthetic.cancel(second)
