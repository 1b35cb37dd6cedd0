"""The worker on a real queue: batches, poison, leases, stopping."""

import asyncio
import contextlib
import gc
import io
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashbulb_service import pipeline, worker
from flashbulb_service.backends import ImageRequest
from flashbulb_service.catalog import Model
from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.finishing import Finished, Finisher
from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.pipeline import MAX_DELIVERING, MAX_DRAWING
from flashbulb_service.presence import Presence, serves
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.tasks import ImageOutcome, ImageTask

PictureJob = Callable[..., NewJob]
WaitUntil = Callable[..., Awaitable[None]]
Start = Callable[..., Any]


def fail_on(word: str) -> Callable[[Sequence[ImageRequest]], None]:
    def check(requests: Sequence[ImageRequest]) -> None:
        if any(word in request.prompt for request in requests):
            raise RuntimeError(f"cannot draw {word}")

    return check


async def read_picture(results: ResultStore, outcome: bytes | None) -> np.ndarray:
    assert outcome is not None
    data = await results.get(ImageOutcome.from_bytes(outcome).file)
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)))


async def test_jobs_of_other_prompts_and_seeds_share_a_batch(
    queue: Queue, start_worker: Start, watched: Any, picture_job: PictureJob
) -> None:
    prompts = ["red apple", "dog", "blue heart", "dog", "rocket"]
    jobs = [picture_job(prompt, seed=index) for index, prompt in enumerate(prompts)]
    ids = (await queue.enqueue(jobs)).ids
    start_worker()
    views = await queue.wait(ids, 10)
    assert sorted(watched.batches[0]) == sorted(prompts)
    assert len(watched.batches) == 1
    outcomes = [ImageOutcome.from_bytes(view.result or b"") for view in views]
    assert [outcome.batch_size for outcome in outcomes] == [5] * 5
    assert set(outcomes[0].stages_ms) == {"text", "denoise", "decode"}


async def test_the_stored_picture_is_the_model_s(
    queue: Queue, start_worker: Start, results: ResultStore, picture_job: PictureJob, apple: np.ndarray
) -> None:
    others = [picture_job("dog", seed=index) for index in range(3)]
    ids = (await queue.enqueue([*others, picture_job()])).ids
    start_worker()
    views = await queue.wait(ids, 10)
    np.testing.assert_array_equal(await read_picture(results, views[-1].result), apple)


async def test_work_that_comes_later_wakes_the_worker(
    queue: Queue, start_worker: Start, picture_job: PictureJob
) -> None:
    start_worker()
    for _ in range(3):
        (view,) = await queue.wait((await queue.enqueue([picture_job()])).ids, 4)  # less than an idle wait
        assert view.state is JobState.DONE


async def test_a_batch_never_exceeds_the_cap(
    queue: Queue, start_worker: Start, watched: Any, picture_job: PictureJob
) -> None:
    ids = (await queue.enqueue([picture_job(seed=seed) for seed in range(7)])).ids
    start_worker(cap=3)
    await queue.wait(ids, 10)
    assert sorted(len(batch) for batch in watched.batches) == [1, 3, 3]


async def test_a_poisoned_row_does_not_harm_its_batch(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    picture_job: PictureJob,
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched.before = fail_on("poison")
    prompts = ["dog", "poison", "rocket"]
    ids = (await queue.enqueue([picture_job(prompt, max_attempts=1) for prompt in prompts])).ids
    start_worker()
    views = await queue.wait(ids, 10)
    assert [view.state for view in views] == [JobState.DONE, JobState.FAILED, JobState.DONE]
    assert [view.attempt for view in views] == [1, 1, 1]
    assert views[1].error is not None
    assert views[1].error.code == "backend_error"
    assert views[1].error.message == "RuntimeError: cannot draw poison"  # for its client
    assert "cannot draw [prompt]" in caplog.text and "poison" not in caplog.text


async def test_jobs_of_a_lost_worker_run_alone(
    queue: Queue, start_worker: Start, watched: Any, picture_job: PictureJob
) -> None:
    """One of them may have killed it: if it does so again, no innocent job may lose an attempt with it."""
    ids = (await queue.enqueue([picture_job(prompt) for prompt in ("dog", "rocket", "apple")])).ids
    assert len(await queue.claim("lost-worker", ["tiny@1"], 8, lease_s=0.001)) == 3
    while not await queue.reap():
        pass
    start_worker()
    views = await queue.wait(ids, 10)
    assert [view.state for view in views] == [JobState.DONE] * 3
    assert sorted(watched.batches) == [["apple"], ["dog"], ["rocket"]]


async def test_a_few_lost_jobs_do_not_turn_batching_off_for_the_backlog(
    queue: Queue, start_worker: Start, watched: Any, picture_job: PictureJob
) -> None:
    """Innocent jobs were handed back beside a suspect, taken for suspects themselves, and ran alone."""
    ids = (await queue.enqueue([picture_job(seed=seed) for seed in range(64)])).ids
    assert len(await queue.claim("lost-worker", ["tiny@1"], 8, lease_s=0.001)) == 8
    while not await queue.reap():
        pass
    start_worker(cap=8)
    views = await queue.wait(ids, 30)
    assert [view.state for view in views] == [JobState.DONE] * 64
    assert len(watched.batches) <= 8 + 56 // 8


async def test_a_backend_that_loses_a_picture_fails_and_does_not_mix_them_up(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    picture_job: PictureJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode = watched.inner.decode
    monkeypatch.setattr(watched, "decode", lambda x0: decode(x0) if len(x0) == 1 else decode(x0)[:1])
    ids = (await queue.enqueue([picture_job(prompt) for prompt in ("dog", "rocket")])).ids
    start_worker()
    assert [view.state for view in await queue.wait(ids, 10)] == [JobState.DONE] * 2
    assert [len(batch) for batch in watched.batches] == [2, 1, 1]


async def test_a_failure_that_passes_is_retried(
    queue: Queue, start_worker: Start, watched: Any, picture_job: PictureJob
) -> None:
    def fail_once(requests: Sequence[ImageRequest]) -> None:
        if len(watched.batches) == 1:
            raise RuntimeError("a passing trouble")

    watched.before = fail_once
    ids = (await queue.enqueue([picture_job()])).ids
    start_worker()
    (view,) = await queue.wait(ids, 10)
    assert (view.state, view.attempt) == (JobState.DONE, 2)


async def test_a_payload_that_is_no_task_fails_at_once_and_alone(
    queue: Queue, start_worker: Start, picture_job: PictureJob
) -> None:
    ids = (await queue.enqueue([picture_job(payload=b"{}"), picture_job()])).ids
    start_worker()
    bad, good = await queue.wait(ids, 10)
    assert bad.error is not None
    assert (bad.state, bad.error.code, bad.attempt) == (JobState.FAILED, "invalid_task", 1)
    assert good.state is JobState.DONE


async def test_a_stopping_worker_leaves_the_list_before_its_batch_is_finished(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    picture_job: PictureJob,
    wait_until: WaitUntil,
    redis_url: str,
    namespace: str,
) -> None:
    presence = Presence.connect(redis_url, namespace=namespace)
    gate = threading.Event()
    watched.before = lambda requests: gate.wait(10)
    ids = (await queue.enqueue([picture_job()])).ids
    running = start_worker()

    async def listed() -> bool:
        return serves(await presence.workers(), "tiny@1")

    async def gone() -> bool:
        return not await listed()

    await wait_until(listed)
    await wait_until(lambda: _truth(watched.batches))
    running.stop.set()
    await wait_until(gone)
    assert not running.task.done()
    gate.set()
    assert await running.task is True
    assert (await queue.wait(ids, 1))[0].state is JobState.DONE
    await presence.aclose()


async def test_stopping_finishes_what_was_claimed_and_claims_no_other(
    queue: Queue, start_worker: Start, watched: Any, picture_job: PictureJob, wait_until: WaitUntil
) -> None:
    """One claim is on the device, one waits behind it, and nothing beyond that is taken."""
    gate = threading.Event()
    watched.before = lambda requests: gate.wait(10)
    ids = (await queue.enqueue([picture_job(seed=seed) for seed in range(3)])).ids
    running = start_worker(cap=1)

    async def two_are_claimed() -> bool:
        return (await queue.stats()).running == 2

    await wait_until(two_are_claimed)
    running.stop.set()
    gate.set()
    assert await running.task is True
    views = [await queue.get(job_id) for job_id in ids]
    assert [view.state for view in views if view] == [JobState.DONE, JobState.DONE, JobState.QUEUED]
    assert views[2] is not None and views[2].attempt == 0
    assert len(watched.batches) == 2


async def test_a_worker_with_nothing_in_hand_stops_at_once_in_an_outage_that_began_at_its_claim(
    queue: Queue,
    start_worker: Start,
    picture_job: PictureJob,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It sent the claim again for all of its drain time, and ended as one that hands back what it has."""
    monkeypatch.setattr(worker, "FRESH_MS", -1e6)  # no claim but by `claim_next`
    monkeypatch.setattr("flashbulb_service.queue.queue.BACKOFF_S", 3600.0)
    running, calls = start_worker(), list[str]()

    async def away(*args: Any, **options: Any) -> None:
        calls.append("take")
        raise QueueUnavailable("planted")

    monkeypatch.setattr(running.worker._queue, "take", away)
    await queue.enqueue([picture_job()])
    await wait_until(lambda: _truth(calls))
    running.stop.set()
    assert await running.task is True
    assert calls == ["take"]


async def test_the_next_batch_runs_while_the_last_one_is_stored(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    results: ResultStore,
    picture_job: PictureJob,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store takes nothing yet; the device draws on, but only as far as the bound of the pipeline."""
    gate, write = threading.Event(), results.write

    def slow_write(name: str, data: bytes) -> None:
        gate.wait(10)
        write(name, data)

    monkeypatch.setattr(results, "write", slow_write)
    ids = (await queue.enqueue([picture_job(seed=seed) for seed in range(9)])).ids
    start_worker(cap=1)
    await wait_until(lambda: _truth(len(watched.batches) >= MAX_DELIVERING))
    stats = await queue.stats()
    assert stats.running <= MAX_DELIVERING + MAX_DRAWING
    gate.set()
    assert [view.state for view in await queue.wait(ids, 10)] == [JobState.DONE] * 9


async def test_a_batch_that_nobody_waits_for_stops_at_a_step(
    queue: Queue, start_worker: Start, watched: Any, picture_job: PictureJob, wait_until: WaitUntil
) -> None:
    gate, decoded = threading.Event(), []
    watched.before = lambda requests: gate.wait(10)
    decode, watched.decode = watched.decode, lambda x0: (decoded.append(len(x0)), decode(x0))[1]
    ids = (await queue.enqueue([picture_job()])).ids
    running = start_worker(lease_s=0.03)
    await wait_until(lambda: _truth(watched.batches))
    await queue.cancel(ids[0])
    (claim,) = running.worker._pipeline._claims.values()
    await wait_until(lambda: _truth(claim.lost))
    gate.set()
    await running.worker._pipeline.drain()
    assert decoded == []


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's collector of cycles away, so that what is in a cycle stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("end", ["abandoned", "failed"])
async def test_a_batch_without_an_end_leaves_nothing_for_the_collector(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    picture_job: PictureJob,
    wait_until: WaitUntil,
    end: str,
) -> None:
    """The frames of its error kept its arrays, and were kept by it: a worker grew by 2 % in minutes of cancels."""
    gate, drawn = threading.Event(), []

    def before(requests: Sequence[ImageRequest]) -> None:
        drawn.append(weakref.ref(requests[0]))
        gate.wait(10)
        if end == "failed":
            raise RuntimeError("no such kernel") from ValueError("shape")

    watched.before = before
    ids = (await queue.enqueue([picture_job(max_attempts=1)])).ids
    running = start_worker(lease_s=0.03 if end == "abandoned" else 5.0)
    await wait_until(lambda: _truth(watched.batches))
    if end == "abandoned":
        await queue.cancel(ids[0])
        (claim,) = running.worker._pipeline._claims.values()
        await wait_until(lambda: _truth(claim.lost))
    with no_collector():
        gate.set()
        await wait_until(lambda: _truth(not running.worker._pipeline._claims))
        await wait_until(lambda: _truth(drawn[0]() is None))


async def test_pictures_that_are_not_delivered_leave_nothing_for_the_collector(
    queue: Queue,
    results: ResultStore,
    start_worker: Start,
    picture_job: PictureJob,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two threads raise an error each, kept where it waits for its reader with the frames that keep the pixels."""
    drawn: list[weakref.ref[np.ndarray]] = []
    encode = Finisher.encode

    def watch(self: Finisher, model: Model, job_id: str, task: ImageTask, pixels: np.ndarray) -> Finished:
        drawn.append(weakref.ref(pixels))
        return encode(self, model, job_id, task, pixels)

    def full(name: str, data: bytes) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Finisher, "encode", watch)
    monkeypatch.setattr(results, "write", full)
    with no_collector():
        await queue.enqueue([picture_job(max_attempts=1), picture_job("dog", max_attempts=1)])
        running = start_worker()
        await wait_until(lambda: _truth(len(drawn) == 2))
        await wait_until(lambda: _truth(not running.worker._pipeline._claims))
        await wait_until(lambda: _truth(all(pixels() is None for pixels in drawn)))


async def test_a_batch_that_outlasts_the_drain_time_is_handed_back(
    queue: Queue, start_worker: Start, watched: Any, picture_job: PictureJob, wait_until: WaitUntil
) -> None:
    gate = threading.Event()
    watched.before = lambda requests: gate.wait(10)
    ids = (await queue.enqueue([picture_job()])).ids
    running = start_worker(drain_s=0.05)
    await wait_until(lambda: _truth(watched.batches))
    running.stop.set()
    try:
        assert await running.task is False
        view = await queue.get(ids[0])
        assert view is not None
        assert view.state is JobState.QUEUED
    finally:
        gate.set()


async def test_a_cancelled_job_has_no_result_though_its_batch_ran(
    queue: Queue, start_worker: Start, watched: Any, picture_job: PictureJob, wait_until: WaitUntil
) -> None:
    gate = threading.Event()
    watched.before = lambda requests: gate.wait(10)
    ids = (await queue.enqueue([picture_job(), picture_job("dog")])).ids
    start_worker()
    await wait_until(lambda: _truth(watched.batches))
    await queue.cancel(ids[0])
    gate.set()
    cancelled, done = await queue.wait(ids, 10)
    assert (cancelled.state, cancelled.result) == (JobState.CANCELLED, None)
    assert done.state is JobState.DONE


async def test_heartbeats_keep_a_batch_that_takes_longer_than_its_lease(
    queue: Queue, start_worker: Start, watched: Any, picture_job: PictureJob, wait_until: WaitUntil
) -> None:
    gate = threading.Event()
    watched.before = lambda requests: gate.wait(10)
    ids = (await queue.enqueue([picture_job()])).ids
    start_worker(lease_s=0.3)
    await wait_until(lambda: _truth(watched.batches))
    before = await queue.get(ids[0])
    assert before is not None and before.started_at is not None
    end = asyncio.get_running_loop().time() + 1.0

    async def three_leases_later() -> bool:
        await queue.reap()
        return asyncio.get_running_loop().time() > end

    await wait_until(three_leases_later)
    gate.set()
    (view,) = await queue.wait(ids, 10)
    assert (view.state, view.attempt) == (JobState.DONE, 1)


async def test_presence_begins_and_ends_with_the_worker(
    redis_url: str, namespace: str, start_worker: Start, wait_until: WaitUntil
) -> None:
    presence = Presence.connect(redis_url, namespace=namespace)

    async def served() -> bool:
        return serves(await presence.workers(), "tiny@1")

    assert not await served()
    running = start_worker()
    await wait_until(served)
    running.stop.set()
    await running.task
    assert not await served()
    await presence.announce(running.worker._me, ttl_s=0.0)  # an entry whose time is over counts as gone
    assert not await served()
    await presence.aclose()


async def _truth(value: object) -> bool:
    return bool(value)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker begin to draw a lone job however late a busy machine wakes it."""
    for limit in ("FRESH_MS", "EARLY_MS"):
        monkeypatch.setattr(worker, limit, 60_000.0)


@pytest.mark.usefixtures("unhurried")
async def test_a_lone_job_is_drawn_while_its_claim_is_on_its_way(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    picture_job: PictureJob,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = start_worker()
    gate, take = asyncio.Event(), running.worker._queue.take

    async def slow_take(*args: Any, **kwargs: Any) -> Any:
        await gate.wait()
        return await take(*args, **kwargs)

    monkeypatch.setattr(running.worker._queue, "take", slow_take)
    await wait_until(lambda: _truth(_sleeps(running)))
    [job_id] = (await queue.enqueue([picture_job()])).ids
    await wait_until(lambda: _truth(watched.batches))
    assert (await queue.views([job_id]))[0].state is JobState.QUEUED  # type: ignore[union-attr]
    gate.set()
    [view] = await queue.wait([job_id], 10)
    assert (view.state, view.attempt) == (JobState.DONE, 1)
    assert len(watched.batches) == 1


@pytest.mark.parametrize("limit", ["FRESH_MS", "EARLY_MS"])
async def test_nothing_is_drawn_before_its_claim_where_that_may_cost_more_than_it_saves(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    picture_job: PictureJob,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
) -> None:
    """On old news another job has come meanwhile, and a long batch in vain keeps the device from real ones."""
    monkeypatch.setattr(worker, limit, -1e6)
    running = start_worker()
    gate, take, calls = asyncio.Event(), running.worker._queue.take, list[str]()

    async def slow_take(*args: Any, **kwargs: Any) -> Any:
        calls.append("take")
        await gate.wait()
        return await take(*args, **kwargs)

    monkeypatch.setattr(running.worker._queue, "take", slow_take)
    await wait_until(lambda: _truth(_sleeps(running)))
    [job_id] = (await queue.enqueue([picture_job()])).ids
    await wait_until(lambda: _truth(calls))
    assert watched.batches == [] and not running.worker._pipeline._claims
    gate.set()
    [view] = await queue.wait([job_id], 10)
    assert view.state is JobState.DONE


@pytest.mark.usefixtures("unhurried")
async def test_a_batch_that_is_given_up_is_not_waited_for(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    picture_job: PictureJob,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next claim is due when the device will be free; a batch that never ends there must not count."""
    running = start_worker()
    pipeline, gate, take = running.worker._pipeline, asyncio.Event(), running.worker._queue.take
    pipeline._known_s["tiny@1", 1] = 3600.0

    async def slow_take(*args: Any, **kwargs: Any) -> Any:
        await gate.wait()
        return await take(*args, **kwargs)

    monkeypatch.setattr(running.worker._queue, "take", slow_take)
    drawing = threading.Event()

    def wait(requests: Sequence[ImageRequest]) -> None:
        assert drawing.wait(10)

    watched.before = wait
    await wait_until(lambda: _truth(_sleeps(running)))
    [job_id] = (await queue.enqueue([picture_job()])).ids
    await wait_until(lambda: _truth(watched.batches))
    assert await queue.cancel(job_id)
    gate.set()
    await wait_until(lambda: _truth(pipeline._claims and next(iter(pipeline._claims.values())).lost))
    pipeline._known_s.clear()
    drawing.set()
    await wait_until(lambda: _truth(not pipeline._claims))
    assert pipeline._free_at <= time.monotonic()


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("fault", ["cancelled", "answer lost"])
async def test_what_was_drawn_without_a_claim_is_not_delivered(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    picture_job: PictureJob,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    running = start_worker()
    gate, take, calls = asyncio.Event(), running.worker._queue.take, list[str]()

    async def faulty_take(*args: Any, **kwargs: Any) -> Any:
        await gate.wait()
        taken = await take(*args, **kwargs)
        calls.append("take")
        if fault == "answer lost" and len(calls) == 1:
            raise QueueUnavailable("planted")
        return taken

    monkeypatch.setattr(running.worker._queue, "take", faulty_take)
    await wait_until(lambda: _truth(_sleeps(running)))
    [job_id] = (await queue.enqueue([picture_job()])).ids
    await wait_until(lambda: _truth(watched.batches))
    if fault == "cancelled":
        assert await queue.cancel(job_id)
    gate.set()
    [view] = await queue.wait([job_id], 10)
    if fault == "cancelled":
        assert (view.state, view.result, view.attempt) == (JobState.CANCELLED, None, 0)
    else:  # it was handed back, and not left to its lease
        assert (view.state, view.attempt) == (JobState.DONE, 2)
    assert (await queue.stats()).running == 0
    [after] = await queue.wait((await queue.enqueue([picture_job(seed=8)])).ids, 10)
    assert after.state is JobState.DONE


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("fault", ["model", "task"])
async def test_a_lone_job_that_fails_before_its_claim_is_answered_ends_failed(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    picture_job: PictureJob,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """The queue must not hear of the failure first, or the lease would bind a job that nobody runs."""
    running = start_worker(lease_s=60.0)
    gate, take = asyncio.Event(), running.worker._queue.take
    watched.before = fail_on("bad")

    async def slow_take(*args: Any, **kwargs: Any) -> Any:
        await gate.wait()
        return await take(*args, **kwargs)

    monkeypatch.setattr(running.worker._queue, "take", slow_take)
    await wait_until(lambda: _truth(_sleeps(running)))
    job = picture_job("bad", max_attempts=1)
    [job_id] = (await queue.enqueue([job if fault == "model" else replace(job, payload=b"{}")])).ids
    await wait_until(lambda: _truth(bool(running.worker._pipeline._claims)))
    for _ in range(20):
        await asyncio.sleep(0.005)
    gate.set()
    [view] = await queue.wait([job_id], 10)
    assert view.state is JobState.FAILED
    assert view.error is not None
    assert view.error.code == ("backend_error" if fault == "model" else "invalid_task")


async def test_a_lone_picture_is_committed_by_the_thread_that_drew_it(
    queue: Queue, start_worker: Start, picture_job: PictureJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "FRESH_MS", -1e6)  # every claim is answered before its job is drawn
    running = start_worker()
    own, threads = running.worker._queue, list[str]()
    complete_here = own.complete_here

    def watched_here(*args: Any, **kwargs: Any) -> bool:
        threads.append(threading.current_thread().name)
        return complete_here(*args, **kwargs)

    monkeypatch.setattr(own, "complete_here", watched_here)
    first = (await queue.enqueue([picture_job(seed=1)])).ids
    await queue.wait(first, 10)  # by either way: the server may not know the script yet
    monkeypatch.setattr(own, "complete", None)
    second = (await queue.enqueue([picture_job(seed=2)])).ids
    [view] = await queue.wait(second, 10)
    assert (view.state, view.attempt) == (JobState.DONE, 1)
    assert threads and all(name.startswith("draw") for name in threads)


async def test_what_a_thread_cannot_commit_the_event_loop_does(
    queue: Queue, start_worker: Start, picture_job: PictureJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start_worker()

    def fail(*args: Any, **kwargs: Any) -> bool:
        raise QueueUnavailable("planted")

    monkeypatch.setattr(running.worker._queue, "complete_here", fail)
    [view] = await queue.wait((await queue.enqueue([picture_job()])).ids, 10)
    assert (view.state, view.attempt) == (JobState.DONE, 1)


@pytest.mark.parametrize("end", ["complete", "fail"])
async def test_how_a_job_ended_is_told_when_an_outage_is_over(
    queue: Queue,
    start_worker: Start,
    watched: Any,
    picture_job: PictureJob,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    """A queue that was away for a third of a second threw away what was drawn, and an attempt was burnt."""
    monkeypatch.setattr(pipeline, "BACKOFF_S", 0.0)
    watched.before = fail_on("bad")
    running, calls = start_worker(), list[str]()
    own = getattr(running.worker._queue, end)

    def away(*args: Any, **kwargs: Any) -> bool:
        raise QueueUnavailable("planted")

    async def away_at_first(*args: Any, **kwargs: Any) -> Any:
        calls.append(end)
        return away() if len(calls) < 10 else await own(*args, **kwargs)

    monkeypatch.setattr(running.worker._queue, "complete_here", away)
    monkeypatch.setattr(running.worker._queue, end, away_at_first)
    job = picture_job("dog" if end == "complete" else "bad", max_attempts=1)
    [view] = await queue.wait((await queue.enqueue([job])).ids, 20)
    assert (view.state, view.attempt) == (JobState.DONE if end == "complete" else JobState.FAILED, 1)
    assert view.error is None or view.error.code == "backend_error"  # and not worker_lost
    assert len(watched.batches) == 1


def _sleeps(running: Any) -> bool:
    return any(line.is_busy for line in running.worker._queue._sleepers)


async def test_upkeep_of_a_worker_that_ends_by_a_bug_is_logged_and_begins_again(
    start_worker: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait_until: WaitUntil,
) -> None:
    """One unforeseen answer of the server, and a worker looked for no new models and took no words on them for good."""
    monkeypatch.setattr("flashbulb_service.outages.RESTART_S", 0.0)
    announce, num_calls = Presence.announce, 0

    async def broken_once(*args: Any, **options: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise ZeroDivisionError
        await announce(*args, **options)

    monkeypatch.setattr(Presence, "announce", broken_once)
    start_worker()

    async def has_begun_again() -> bool:
        return num_calls > 1

    await wait_until(has_begun_again)
    assert "ZeroDivisionError" in caplog.text
