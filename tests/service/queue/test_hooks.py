"""Hooks: when the end of a request is due to be told, how often, and what a replay does to it."""

from collections.abc import Callable

from flashbulb_service.jobs import Job, JobError, NewJob
from flashbulb_service.queue import DueHook, Kept, Limits, Queue
from flashbulb_service.webhooks import LEASE_S, MAX_ATTEMPTS, retry_delay_s

HOOKED = Kept(record=b"what was asked", owner="me", hook=True)
MODELS = ["emoji@1"]
BOOM = JobError("boom", "the backend broke")


def new(count: int) -> list[NewJob]:
    return [NewJob(model="emoji@1", bucket="64x64", payload=b"p") for _ in range(count)]


async def start(queue: Queue, count: int) -> list[Job]:
    """Enqueue a request with a hook and claim its jobs."""
    await queue.enqueue(new(count), keep=HOOKED)
    return await queue.claim("w", MODELS, count, 60.0)


async def due(queue: Queue) -> list[DueHook]:
    return (await queue.due_hooks(LEASE_S))[0]


async def test_what_a_hook_tells_is_kept_for_all_its_tries_however_short_results_live(
    make_queue: Callable[..., Queue],
) -> None:
    """The record went with the results, and the later tries with it: not told, not counted as given up."""
    queue = make_queue(Limits(result_ttl_s=60.0))
    jobs = await start(queue, 2)
    for job in jobs:
        await queue.complete("w", job, b"r")
    delays = [retry_delay_s(attempt, 1.0) or 0.0 for attempt in range(1, MAX_ATTEMPTS + 1)]
    needed_s = sum(delays) + MAX_ATTEMPTS * LEASE_S
    assert all([await queue._client.ttl(queue.keys.job(job.id)) > needed_s for job in jobs])


async def test_a_call_that_had_to_wait_for_others_costs_no_attempt(queue: Queue) -> None:
    (job,) = await start(queue, 1)
    await queue.complete("w", job, b"r")
    (hook,) = await due(queue)
    await queue.hook_done(hook, again_in_s=0.0, counts=False)
    assert await due(queue) == [hook]
    await queue.hook_done(hook, again_in_s=0.0)
    assert await due(queue) == [DueHook(job.id, attempt=2)]


async def test_a_replayed_jobs_end_is_told_after_its_failure_was(queue: Queue) -> None:
    """Its request was taken for one that had ended already: nobody heard of the success."""
    (job,) = await start(queue, 1)
    await queue.fail("w", job, BOOM, retry=False)
    (failed,) = await due(queue)
    await queue.hook_done(failed, again_in_s=None)
    assert await queue.replay_dead(job.id)
    (again,) = await queue.claim("w", MODELS, 1, 60.0)
    assert await due(queue) == []
    await queue.complete("w", again, b"r")
    assert await due(queue) == [DueHook(job.id, attempt=1, replays=1)]


async def test_a_request_that_is_partly_replayed_has_ended_when_its_last_job_has(queue: Queue) -> None:
    """The end of the replayed job counted as that of the one that still ran, and what ended last told nobody."""
    first, second = await start(queue, 2)
    await queue.fail("w", first, BOOM, retry=False)
    await queue.replay_dead(first.id)
    (again,) = await queue.claim("w", MODELS, 1, 60.0)
    await queue.complete("w", again, b"r")
    assert await due(queue) == []
    await queue.complete("w", second, b"r")
    assert [hook.request_id for hook in await due(queue)] == [first.id]


async def test_a_delivery_from_before_a_replay_does_not_end_the_one_behind_it(queue: Queue) -> None:
    (job,) = await start(queue, 1)
    await queue.fail("w", job, BOOM, retry=False)
    (slow,) = await due(queue)
    await queue.replay_dead(job.id)
    (again,) = await queue.claim("w", MODELS, 1, 60.0)
    await queue.complete("w", again, b"r")
    await queue.hook_done(slow, again_in_s=None)
    (newer,) = await due(queue)
    await queue.hook_done(slow, again_in_s=None)
    assert (newer.attempt, newer.replays) == (1, 1)
    await queue.hook_done(newer, again_in_s=0.0)
    assert [hook.attempt for hook in await due(queue)] == [2]
