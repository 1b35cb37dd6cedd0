"""A request as a whole: read back, listed, watched; and the ways an idempotency key works."""

import time
from collections.abc import Callable

import pytest

from flashbulb_service.errors import InvalidRequest, JobNotFound
from flashbulb_service.jobs import JobError, JobState, NewJob
from flashbulb_service.queue import Event, Kept, Limits, Queue

EVENTS = Kept(record=b"what was asked", owner="me", lists=("me",), events=True)


def new() -> NewJob:
    return NewJob(model="emoji@1", bucket="64x64", payload=b"p")


async def end(queue: Queue, *, failing: str) -> None:
    """End what waits: one job fails for good, the others get results."""
    for job in await queue.claim("w", ["emoji@1"], 2, 10.0):
        if job.id == failing:
            await queue.fail("w", job, JobError("broken", "no"), retry=False)
        else:
            await queue.complete("w", job, b"r")


async def take(queue: Queue, request_id: str, count: int, after: str = "0") -> list[Event]:
    seen: list[Event] = []
    watching = queue.watch(request_id, after=after, quiet_s=5)
    async for event in watching:
        assert event is not None, f"silence after {seen}"
        seen.append(event)
        if len(seen) == count:
            break
    await watching.aclose()
    return seen


async def test_kept_request_is_read_back_and_listed_for_its_owner_only(queue: Queue) -> None:
    ids = [(await queue.enqueue([new(), new()], keep=EVENTS)).ids for _ in range(3)]
    view = await queue.request(ids[0][0])
    assert view is not None
    assert (view.record, view.owner, view.rows) == (b"what was asked", "me", ids[0])
    assert [one.id for one in await queue.requests("me")] == [one[0] for one in reversed(ids)]
    assert [one.id for one in await queue.requests("me", limit=1, newest_first=False)] == [ids[0][0]]
    page = await queue.requests("me", after=ids[0][0], newest_first=False)
    assert [one.id for one in page] == [ids[1][0], ids[2][0]]
    assert await queue.requests("you") == []
    with pytest.raises(JobNotFound):
        await queue.requests("me", after="nobody")
    assert await queue.request((await queue.enqueue([new()])).ids[0]) is None


async def test_watched_request_tells_every_move_in_order(queue: Queue) -> None:
    (lead,) = (await queue.enqueue([new()], keep=EVENTS)).ids
    (job,) = await queue.claim("w", ["emoji@1"], 1, 5.0)
    await queue.progress("w", job, "half")
    await queue.fail("w", job, JobError("broken", "no"), retry=True, delay_s=0.0)
    await queue.reap()
    (job,) = await queue.claim("w", ["emoji@1"], 1, 5.0)
    await queue.complete("w", job, b"r")
    events = await take(queue, lead, 7)
    assert [event.kind for event in events] == [
        "queued", "running", "progress", "retry", "queued", "running", "done",
    ]  # fmt: skip
    assert events[2].data == {"data": "half"}
    again = await take(queue, lead, 4, after=events[2].id)
    assert [event.id for event in again] == [event.id for event in events[3:]]


async def test_stale_worker_cannot_tell_progress(queue: Queue) -> None:
    await queue.enqueue([new()], keep=EVENTS)
    (job,) = await queue.claim("w", ["emoji@1"], 1, 5.0)
    assert not await queue.progress("other", job, "x")
    await queue.cancel(job.id)
    assert not await queue.progress("w", job, "x")


async def test_events_are_kept_no_longer_than_their_request(make_queue: Callable[..., Queue]) -> None:
    """They were kept for an hour, whatever became of the request: a busy server with short results filled up."""
    queue = make_queue(Limits(result_ttl_s=5.0))
    (lead,) = (await queue.enqueue([new()], keep=EVENTS)).ids
    (job,) = await queue.claim("w", ["emoji@1"], 1, 5.0)
    await queue.complete("w", job, b"r")
    assert 0 < await queue._client.pttl(queue.keys.events(lead)) <= 5000


async def test_unwatched_jobs_write_no_stream(queue: Queue, make_queue: Callable[..., Queue]) -> None:
    (job_id,) = (await queue.enqueue([new()])).ids
    assert await queue._client.exists(queue.keys.events(job_id)) == 0


@pytest.mark.parametrize("dead", [0, 1])
async def test_a_dead_letter_whose_request_nobody_can_read_any_more_is_not_replayed(
    queue: Queue, dead: int
) -> None:
    """Dead letters live longer than results: a replay was drawn for a client that got 404."""
    ids = (await queue.enqueue([new(), new()], keep=EVENTS)).ids
    await end(queue, failing=ids[dead])
    await queue._client.pexpire(queue.keys.job(ids[1 - dead]), 0)
    with pytest.raises(InvalidRequest, match="deleted or has expired"):
        await queue.replay_dead(ids[dead])
    assert [letter.id for letter in await queue.dead_letters()] == [ids[dead]]


@pytest.mark.parametrize("dead", [0, 1])
async def test_a_request_can_be_read_as_long_after_a_replay_as_after_its_first_end(
    queue: Queue, dead: int
) -> None:
    """Its other jobs were there at the replay, and expired before or soon after its end: the client got 404."""
    ids = (await queue.enqueue([new(), new()], keep=EVENTS)).ids
    await end(queue, failing=ids[dead])
    other = queue.keys.job(ids[1 - dead])

    async def is_kept() -> bool:
        left_ms: int = await queue._client.pttl(other)
        await queue._client.pexpire(other, 60_000)  # nearly all of its time goes by
        return left_ms > 60_000

    assert await is_kept()
    assert await queue.replay_dead(ids[dead])
    assert await is_kept()
    [job] = await queue.claim("w", ["emoji@1"], 1, 10.0)
    await queue.complete("w", job, b"r")
    assert await is_kept()


async def test_a_replay_that_fails_keeps_the_other_jobs_no_longer_than_results_live(
    make_queue: Callable[..., Queue],
) -> None:
    """They were kept as long as a dead letter, without their files: the next replay was drawn for nobody."""
    queue = make_queue(Limits(result_ttl_s=60.0, dead_ttl_s=600.0))
    ids = (await queue.enqueue([new(), new()], keep=EVENTS)).ids
    await end(queue, failing=ids[0])
    assert await queue.replay_dead(ids[0])
    [job] = await queue.claim("w", ["emoji@1"], 1, 10.0)
    await queue.fail("w", job, JobError("broken", "no"), retry=False)
    dead_ms, other_ms = [await queue._client.pttl(queue.keys.job(job_id)) for job_id in ids]
    assert 0 < other_ms <= 60_000 < dead_ms


async def test_a_dead_letter_is_not_replayed_when_the_other_files_of_its_request_are_gone(
    make_queue: Callable[..., Queue],
) -> None:
    """An earlier replay keeps the other jobs' hashes longer than their files live: the next was drawn for nobody."""
    queue = make_queue(Limits(result_ttl_s=60.0, dead_ttl_s=600.0))
    ids = (await queue.enqueue([new(), new()], keep=EVENTS)).ids
    now = time.time()

    await end(queue, failing=ids[0])
    assert await queue.replay_dead(ids[0], now=now + 50)
    await end(queue, failing=ids[0])
    with pytest.raises(InvalidRequest, match="deleted or has expired"):
        await queue.replay_dead(ids[0], now=now + 70)


async def test_a_dead_letter_of_a_deleted_request_is_not_replayed(queue: Queue) -> None:
    (lead,) = (await queue.enqueue([new()], keep=EVENTS)).ids
    (job,) = await queue.claim("w", ["emoji@1"], 1, 10.0)
    await queue.fail("w", job, JobError("broken", "no"), retry=False)
    view = await queue.request(lead)
    assert view is not None and await queue.forget(view, EVENTS.lists)
    with pytest.raises(InvalidRequest, match="deleted or has expired"):
        await queue.replay_dead(lead)


async def test_recorded_key_is_attached_to_only_by_a_retry(queue: Queue) -> None:
    key = {"idempotency_key": "k", "request_digest": "body"}
    first = await queue.enqueue([new()], mode="record", **key)  # type: ignore[arg-type]
    second = await queue.enqueue([new()], mode="record", **key)  # type: ignore[arg-type]
    assert second.created and second.ids != first.ids
    retry = await queue.enqueue([new()], mode="attach", window_s=60, **key)  # type: ignore[arg-type]
    assert (retry.ids, retry.created) == (second.ids, False)
    await queue.cancel(second.ids[0])
    assert (await queue.enqueue([new()], mode="attach", window_s=60, **key)).created  # type: ignore[arg-type]


async def test_jobs_are_abandoned_by_the_last_who_waits_for_them_however_often_each_says_so(
    queue: Queue,
) -> None:
    """A call whose answer was lost is sent again: it must not speak for somebody else."""
    key = {"idempotency_key": "k", "request_digest": "body", "window_s": 60}
    first = await queue.enqueue([new(), new()], mode="record", **key)  # type: ignore[arg-type]
    second, third = [
        await queue.enqueue([new(), new()], mode="attach", **key)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    assert first.ids == second.ids == third.ids
    for leaving in (second, second, first, first, second):
        assert await queue.abandon(first.ids, leaving.waiter) == 0
    assert await queue.abandon(first.ids, third.waiter) == 2
    assert await queue.abandon(first.ids, third.waiter) == 0


async def test_a_job_to_be_read_later_outlives_who_joined_it_and_left(queue: Queue) -> None:
    """`POST /v1/jobs` waits for nothing; a picture's request may join it, and took it along when its client left."""
    key = {"idempotency_key": "k", "request_digest": "body", "window_s": 60}
    job = await queue.enqueue([new()], mode="record", awaited=False, **key)  # type: ignore[arg-type]
    joined = await queue.enqueue([new()], mode="attach", **key)  # type: ignore[arg-type]
    assert await queue.abandon(joined.ids, joined.waiter) == 0
    assert [view.state for view in await queue.views(job.ids) if view] == [JobState.QUEUED]


async def test_position_counts_those_before(queue: Queue) -> None:
    ids = (await queue.enqueue([new(), new(), new()])).ids
    views = await queue.views(ids)
    assert sorted([await queue.position(view) for view in views if view]) == [0, 1, 2]
