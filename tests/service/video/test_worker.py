"""Videos on a worker that serves pictures as well: files, equal bytes, progress, turns, cancellation."""

import asyncio
import contextlib
import io
import threading

import av
import numpy as np
from PIL import Image

from flashbulb_service.backends import ImageRequest, Student
from flashbulb_service.jobs import JobState
from flashbulb_service.queue import Kept, Queue
from flashbulb_service.results import video_file
from flashbulb_service.tasks import ImageOutcome, StepDone
from support.tiny_bundle import FPS, FRAMES

WAIT_S = 20


async def outcome_of(mixed, ids):
    views = await mixed.queue.wait(ids, WAIT_S)
    assert [view.state for view in views] == [JobState.DONE] * len(ids), views
    return [ImageOutcome.from_bytes(view.result) for view in views]


async def test_a_video_job_ends_with_a_video_a_thumbnail_and_a_sheet_of_what_the_student_draws(
    mixed, video_job
):
    mixed.start()
    queued = await mixed.queue.enqueue([video_job()])
    (outcome,) = await outcome_of(mixed, queued.ids)
    name = queued.ids[0]
    assert outcome.file == f"{name}.mp4"
    request = ImageRequest("red apple", 7, 0, 64, 64, frames=FRAMES)
    (drawn,) = Student(mixed.videos.inner).generate([request])
    with av.open(io.BytesIO(await mixed.results.get(outcome.file))) as container:
        stream = container.streams.video[0]
        frames = np.array([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert float(stream.duration * stream.time_base) == FRAMES / FPS
    assert frames.shape == drawn.shape
    seen, wanted = (
        pixels @ (0.2126, 0.7152, 0.0722) for pixels in (frames, drawn)
    )  # colours lose resolution
    assert np.corrcoef(seen.ravel(), wanted.ravel())[0, 1] > 0.98
    sheet = Image.open(io.BytesIO(await mixed.results.get(video_file(name, "spritesheet"))))
    thumbnail = Image.open(io.BytesIO(await mixed.results.get(video_file(name, "thumbnail"))))
    assert (thumbnail.size, sheet.size) == ((64, 64), (3 * 64, 2 * 64))
    for file in (outcome.file, video_file(name, "thumbnail"), video_file(name, "spritesheet")):
        assert b"trainedAlgorithmicMedia" in await mixed.results.get(file)


async def test_a_video_has_the_same_bytes_alone_and_in_a_batch(mixed, video_job):
    jobs = [video_job(prompt, seed) for prompt, seed in (("dog", 1), ("red apple", 7), ("", 2**63 - 1))]
    queued = await mixed.queue.enqueue(jobs)
    mixed.start()
    together = await outcome_of(mixed, queued.ids)
    assert [one.batch_size for one in together] == [3, 3, 3]
    alone = await outcome_of(mixed, (await mixed.queue.enqueue([video_job()])).ids)
    assert mixed.videos.sizes == [3, 1]
    assert await mixed.results.get(alone[0].file) == await mixed.results.get(together[1].file)


async def test_every_step_is_told_to_those_who_watch(mixed, video_job):
    kept = Kept(record=b"{}", owner="me", events=True)
    queued = await mixed.queue.enqueue([video_job()], keep=kept)
    mixed.start()
    await outcome_of(mixed, queued.ids)
    events = await mixed.queue.past_events(queued.ids[0], after="0")
    assert [event.kind for event in events] == ["queued", "running", *["progress"] * 4, "done"]
    told = [StepDone.from_bytes(event.data["data"].encode()) for event in events if event.kind == "progress"]
    assert [(one.step, one.steps) for one in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert await mixed.queue.last_step(queued.ids[0]) == '{"step":4,"steps":4}'


async def test_the_last_step_is_told_before_the_end_however_late_it_is_told(mixed, video_job, monkeypatch):
    """The thread that drew it once committed the video meanwhile, and nobody heard of a step of an ended job."""
    tell = Queue.step_done

    async def late(self, worker_id, jobs, data, models):
        if data == StepDone(step=4, steps=4).to_bytes().decode():
            with contextlib.suppress(TimeoutError):
                await mixed.queue.wait([jobs[0].id], 0.5)  # long enough for the video to be written
        return await tell(self, worker_id, jobs, data, models)

    monkeypatch.setattr(Queue, "step_done", late)
    mixed.start()
    await outcome_of(
        mixed, (await mixed.queue.enqueue([video_job()])).ids
    )  # the server knows the script since
    kept = Kept(record=b"{}", owner="me", events=True)
    queued = await mixed.queue.enqueue([video_job()], keep=kept)
    await outcome_of(mixed, queued.ids)
    events = await mixed.queue.past_events(queued.ids[0], after="0")
    assert [event.kind for event in events] == ["queued", "running", *["progress"] * 4, "done"]


async def test_an_image_that_comes_during_a_step_is_drawn_before_the_next_step(mixed, video_job, image_job):
    """Also when it is still in the queue at the end of the step: the worker looks before it goes on."""
    loop, stored = asyncio.get_running_loop(), {step: threading.Event() for step in (1, 3)}
    images = []

    async def store(step):
        images.append((await mixed.queue.enqueue([image_job(seed=step)])).ids[0])
        stored[step].set()

    def at_step(step, requests):
        if step in stored:
            asyncio.run_coroutine_threadsafe(store(step), loop)
            assert stored[step].wait(10)

    mixed.videos.at_step = at_step
    mixed.start()
    video = (await mixed.queue.enqueue([video_job()])).ids
    await outcome_of(mixed, video)
    await outcome_of(mixed, images)
    assert mixed.log == ["step 1", "image", "step 2", "step 3", "image", "step 4"]


async def test_a_cancelled_video_frees_the_device_at_the_end_of_its_step(mixed, video_job):
    loop, cancelled = asyncio.get_running_loop(), threading.Event()
    ids = []

    async def cancel():
        await mixed.queue.cancel(ids[0])
        cancelled.set()

    def at_step(step, requests):
        if step == 2 and requests[0].prompt == "dog":
            asyncio.run_coroutine_threadsafe(cancel(), loop)
            assert cancelled.wait(10)

    mixed.videos.at_step = at_step
    ids += (await mixed.queue.enqueue([video_job("dog")])).ids
    mixed.start(lease_s=600.0)  # the next heartbeat is far away: it is not what tells the worker
    (view,) = await mixed.queue.wait(ids, WAIT_S)
    assert view.state is JobState.CANCELLED
    await outcome_of(mixed, (await mixed.queue.enqueue([video_job()])).ids)
    assert mixed.log == ["step 1", "step 2", "step 1", "step 2", "step 3", "step 4"]
    assert await mixed.results.get(f"{ids[0]}.mp4") is None


async def test_a_video_goes_on_while_nothing_else_waits_and_another_follows_at_once(mixed, video_job):
    queued = await mixed.queue.enqueue([video_job(seed=seed) for seed in range(9)])  # one more than a batch
    mixed.start()
    await outcome_of(mixed, queued.ids)
    assert mixed.videos.sizes == [8, 1]


async def test_a_batch_holds_no_more_tokens_than_the_operator_allows(mixed, video_job):
    row = 4 * 4 * FRAMES * 4  # patches of 16 pixels, frames, steps
    queued = await mixed.queue.enqueue([video_job(seed=seed) for seed in range(5)])
    mixed.start(max_tokens=2 * row + row // 2)
    await outcome_of(mixed, queued.ids)
    assert mixed.videos.sizes == [2, 2, 1]


async def test_without_an_encoder_a_video_fails_in_one_clear_line(mixed, video_job, monkeypatch):
    def missing(pixels, fps):
        raise ImportError("videos are written with PyAV, which is not installed")

    monkeypatch.setattr("flashbulb_service.finishing.encode_video", missing)
    mixed.start()
    (view,) = await mixed.queue.wait((await mixed.queue.enqueue([video_job()])).ids, WAIT_S)
    assert (view.state, view.error.code) == (JobState.FAILED, "encoder_unavailable")
    assert "PyAV" in view.error.message


async def lose(mixed, *jobs):
    """Have a worker claim jobs and go silent; return their ids."""
    ids = []
    for job in jobs:
        ids += (await mixed.queue.enqueue([job])).ids
        assert len(await mixed.queue.claim("lost-worker", [job.model], 8, lease_s=0.001)) == 1
    lost = 0
    while lost < len(jobs):
        lost += await mixed.queue.reap()
    return ids


async def test_a_picture_and_a_video_that_may_have_killed_a_worker_are_drawn_one_after_the_other(
    mixed, video_job, image_job
):
    """Both lanes claim at the same time: each of the two waited for the other's end, and a worker hung for good."""
    ids = await lose(mixed, image_job(), video_job())
    waited_with_a_model = []
    worker = mixed.start()
    for backend, waiting in ((mixed.images, "tiny-video@1"), (mixed.videos, "tiny@1")):
        backend.at_step = lambda step, requests, waiting=waiting: waited_with_a_model.append(
            worker._pool.served[waiting].users
        )
    await outcome_of(mixed, ids)
    assert sorted(mixed.log) == ["image", "step 1", "step 2", "step 3", "step 4"]
    assert mixed.log.index("image") in (0, 4)
    assert set(waited_with_a_model) == {0}  # whoever needs its room would wait for what waits


async def test_a_picture_that_was_claimed_beside_a_suspect_is_drawn_after_it(
    mixed, video_job, image_job, monkeypatch
):
    ids = await lose(mixed, video_job())
    begun, claimed, take = asyncio.Event(), threading.Event(), Queue.take

    async def late(self, worker_id, plan, *args, **options):
        taken = await take(self, worker_id, plan, *args, **options)
        if plan.model == "tiny@1":
            await begun.wait()
            claimed.set()
        return taken

    def at_step(step, requests):
        if step == 1:
            loop.call_soon_threadsafe(begun.set)
            assert claimed.wait(10)

    loop, mixed.videos.at_step = asyncio.get_running_loop(), at_step
    monkeypatch.setattr(Queue, "take", late)
    ids += (await mixed.queue.enqueue([image_job()])).ids
    mixed.start()
    await outcome_of(mixed, ids)
    assert mixed.log == ["step 1", "step 2", "step 3", "step 4", "image"]
