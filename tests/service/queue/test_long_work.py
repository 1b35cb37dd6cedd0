"""Long work in the queue: its steps, how it counts beside short work, and how a request is forgotten."""

import pytest

from flashbulb_service.errors import DeadlineUnreachable
from flashbulb_service.jobs import JobError, JobState, NewJob
from flashbulb_service.queue import Kept
from flashbulb_service.scheduler import Plan
from flashbulb_service.timing import Tau

VIDEO, IMAGE = "64x64x16:4:long", "64x64:1"
KEPT = Kept(record=b"r", owner="me", lists=("me", "me/videos"), events=True)


def new(bucket: str, model: str = "clip@1", **fields) -> NewJob:
    return NewJob(model=model, bucket=bucket, payload=b"p", **fields)


async def take(queue, worker, bucket, model, *, now, predicted_ms):
    """Enqueue a job and lease it, believed to take so long."""
    (job_id,) = (await queue.enqueue([new(bucket, model)], now=now)).ids
    plan = Plan(model, bucket, (job_id,), predicted_ms=predicted_ms, charges_ms=(1.0,))
    return (await queue.take(worker, plan, 600.0, now=now)).jobs[0]


async def test_a_step_is_read_back_and_written_down_for_those_who_still_hold_the_job(queue):
    (lead,) = (await queue.enqueue([new(VIDEO)], keep=KEPT)).ids
    (gone,) = (await queue.enqueue([new(VIDEO)])).ids
    jobs = await queue.claim("w", ["clip@1"], 8, 60.0)
    await queue.cancel(gone)
    assert await queue.step_done("w", jobs, "1 of 4", ["clip@1"]) == ({gone}, False)
    assert await queue.last_step(lead) == "1 of 4"
    assert [event.kind for event in await queue.past_events(lead, after="0")][-1] == "progress"
    await queue.enqueue([new(IMAGE, "emoji@1")])
    assert await queue.step_done("w", jobs, "2 of 4", ["clip@1", "emoji@1"]) == ({gone}, True)
    await queue.set_gate("emoji@1", "paused")
    assert await queue.step_done("w", jobs, "2 of 4", ["clip@1", "emoji@1"]) == ({gone}, False)
    assert await queue.step_done("thief", jobs, "3 of 4", []) == ({lead, gone}, False)
    assert await queue.last_step(lead) == "2 of 4"


async def test_a_lost_workers_steps_are_forgotten_with_its_lease(queue):
    await queue.enqueue([new(VIDEO)], now=100.0)
    (job,) = await queue.claim("w", ["clip@1"], 1, 10.0, now=100.0)
    await queue.step_done("w", [job], "3 of 4", [], now=101.0)
    await queue.reap(now=111.0)
    assert (await queue.get(job.id)).state is JobState.QUEUED
    assert await queue.last_step(job.id) is None


async def test_a_worker_in_the_middle_of_long_work_is_free_for_short_work_but_not_for_more_of_it(queue):
    tau = Tau(0.0, 0.0, 50.0)
    times = {("emoji@1", IMAGE): (tau, 8), ("clip@1", VIDEO): (tau, 8)}
    await queue.publish_times("w", times, 600.0, now=100.0)
    await take(queue, "w", VIDEO, "clip@1", now=100.0, predicted_ms=60_000)
    await queue.enqueue([new(IMAGE, "emoji@1", deadline_s=1.0)], now=100.0)
    with pytest.raises(DeadlineUnreachable):
        await queue.enqueue([new(VIDEO, deadline_s=1.0)], now=100.0)


@pytest.mark.parametrize("end", ["complete", "cancel", "release", "reap"])
async def test_who_has_ended_its_long_work_is_not_counted_as_busy_with_it(queue, end):
    job = await take(queue, "w", VIDEO, "clip@1", now=100.0, predicted_ms=900_000)
    assert (await queue.window("other", ["clip@1"], 8, now=101.0)).num_long == 1
    await take(queue, "w", IMAGE, "emoji@1", now=101.0, predicted_ms=10)  # between two steps
    assert (await queue.window("other", ["clip@1"], 8, now=101.0)).num_long == 1
    if end == "complete":
        await queue.complete("w", job, b"done", now=102.0)
    elif end == "cancel":
        await queue.cancel(job.id, now=102.0)
    elif end == "release":
        await queue.release("w", [job])
    else:
        await queue.reap(now=800.0)
    assert (await queue.window("other", ["clip@1"], 8, now=101.0)).num_long == 0


@pytest.mark.parametrize("predicted_ms", [0, 300])
async def test_long_work_counts_as_long_as_it_runs_whatever_was_predicted(queue, predicted_ms):
    """A video of unknown time, or slower than predicted, was not counted: all workers could make one."""
    job = await take(queue, "w", VIDEO, "clip@1", now=100.0, predicted_ms=predicted_ms)
    await take(queue, "another", VIDEO, "clip@1", now=101.0, predicted_ms=predicted_ms)
    assert (await queue.window("other", ["clip@1"], 8, now=102.0)).num_long == 2
    assert (await queue.window("w", ["clip@1"], 8, now=102.0)).num_long == 1
    await queue.complete("w", job, b"done", now=103.0)
    assert (await queue.window("other", ["clip@1"], 8, now=103.0)).num_long == 1


async def test_a_worker_is_busy_with_long_work_until_the_last_of_its_rows_has_ended(queue):
    """One video of a batch was cancelled, and its worker counted as free while it made the other one."""
    ids = (await queue.enqueue([new(VIDEO), new(VIDEO)], now=100.0)).ids
    plan = Plan("clip@1", VIDEO, ids, predicted_ms=900_000, charges_ms=(1.0, 1.0))
    kept, gone = (await queue.take("w", plan, 600.0, now=100.0)).jobs
    await queue.cancel(gone.id, now=101.0)
    assert (await queue.window("other", ["clip@1"], 8, now=101.0)).num_long == 1
    await queue.complete("w", kept, b"done", now=102.0)
    assert (await queue.window("other", ["clip@1"], 8, now=102.0)).num_long == 0


@pytest.mark.parametrize("end", ["requeued", "cancelled"])
async def test_a_video_that_waits_for_its_retry_says_nothing_of_the_worker_that_failed_at_it(queue, end):
    failed = await take(queue, "w", VIDEO, "clip@1", now=100.0, predicted_ms=900_000)
    await queue.fail("w", failed, JobError("boom", "x"), retry=True, delay_s=5.0, now=101.0)
    assert (await queue.window("other", ["clip@1"], 8, now=101.0)).num_long == 0
    await take(queue, "w", VIDEO, "clip@1", now=102.0, predicted_ms=900_000)
    if end == "requeued":
        assert await queue.reap(now=106.0) == 1
    else:
        await queue.cancel(failed.id, now=103.0)
    assert (await queue.window("other", ["clip@1"], 8, now=107.0)).num_long == 1


async def test_a_forgotten_request_is_cancelled_and_no_longer_read_or_listed(queue):
    running = (await queue.enqueue([new(VIDEO)], keep=KEPT)).ids[0]
    await queue.claim("w", ["clip@1"], 1, 60.0)
    other = (await queue.enqueue([new(VIDEO)], keep=KEPT)).ids[0]
    assert [one.id for one in await queue.requests("me/videos")] == [other, running]
    view = await queue.request(running)
    assert await queue.forget(view, KEPT.lists)
    assert not await queue.forget(view, KEPT.lists)
    assert await queue.request(running) is None
    for name in KEPT.lists:
        assert [one.id for one in await queue.requests(name)] == [other]
    assert (await queue.get(running)).state is JobState.CANCELLED
    assert (await queue.get(other)).state is JobState.QUEUED


@pytest.mark.parametrize("mode", ["replay", "attach"])
async def test_the_key_of_a_forgotten_request_makes_a_new_one(queue, mode):
    """Its jobs' hashes were still there, so that the key led to a request that was 404 for as long as the key lived."""
    fields = {"idempotency_key": "k", "request_digest": "d", "mode": mode, "window_s": 60.0, "keep": KEPT}
    first = await queue.enqueue([new(VIDEO)], **fields)
    [job] = await queue.claim("w", ["clip@1"], 1, 60.0)
    await queue.complete("w", job, b"video")
    assert not (await queue.enqueue([new(VIDEO)], **fields)).created
    await queue.forget(await queue.request(first.ids[0]), KEPT.lists)
    second = await queue.enqueue([new(VIDEO)], **fields)
    assert second.created
    assert await queue.request(second.ids[0]) is not None
    assert (await queue.enqueue([new(VIDEO)], **fields)).ids == second.ids
