"""A running job: fencing, retries, dead letters, release, cancellation, lost workers."""

import asyncio

import pytest

from flashbulb_service.errors import QueueFull, QueueUnavailable
from flashbulb_service.jobs import JobError, JobState, NewJob
from flashbulb_service.queue import Limits, Sparing

BOOM = JobError("boom", "the backend broke")
MODELS = ["emoji@1"]


def new(payload: bytes = b"p", **kwargs) -> NewJob:
    return NewJob(**{"model": "emoji@1", "bucket": "64x64", "payload": payload, **kwargs})


async def start_one(queue, worker="w", now=100.0, **kwargs):
    """Enqueue one job and claim it with a lease of 10 s."""
    await queue.enqueue([new(**kwargs)], now=now)
    [job] = await queue.claim(worker, MODELS, 1, 10.0, now=now)
    return job


async def test_completed_job_has_its_result(queue):
    job = await start_one(queue)
    assert await queue.complete("w", job, b"\x00result", now=103.0)
    view = await queue.get(job.id)
    assert (view.state, view.result, view.attempt) == (JobState.DONE, b"\x00result", 1)
    assert (view.enqueued_at, view.started_at, view.finished_at) == (100.0, 100.0, 103.0)


async def test_completing_again_finds_the_same_result_standing(queue):
    job = await start_one(queue)
    assert await queue.complete("w", job, b"first")
    assert await queue.complete("w", job, b"second")  # a repeated call of the same holder changes nothing
    assert (await queue.get(job.id)).result == b"first"


async def test_complete_by_another_worker_is_refused(queue):
    job = await start_one(queue)
    assert not await queue.complete("thief", job, b"stolen")
    assert await queue.fail("thief", job, BOOM, retry=True) is JobState.RUNNING
    assert await queue.heartbeat("thief", [job], 10) == {job.id}
    assert await queue.release("thief", [job]) == 0
    assert (await queue.get(job.id)).state is JobState.RUNNING


async def test_late_complete_of_an_older_attempt_is_refused(queue):
    old = await start_one(queue)
    await queue.reap(now=111.0)
    [again] = await queue.claim("w", MODELS, 1, 10.0, now=112.0)  # even by the same worker
    assert (old.attempt, again.attempt) == (1, 2)
    assert not await queue.complete("w", old, b"late")
    assert await queue.heartbeat("w", [old], 10, now=112.0) == {old.id}
    assert await queue.fail("w", old, BOOM, retry=False) is JobState.RUNNING
    assert await queue.complete("w", again, b"right")
    assert not await queue.complete("w", old, b"late")
    assert (await queue.get(old.id)).result == b"right"


async def test_complete_of_a_job_that_is_gone_is_refused(queue, client):
    job = await start_one(queue)
    await queue.complete("w", job, b"")
    await client.delete(queue.keys.job(job.id))
    assert not await queue.complete("w", job, b"")
    assert await queue.fail("w", job, BOOM, retry=True) is JobState.CANCELLED


async def test_heartbeat_keeps_the_lease(queue):
    job = await start_one(queue)
    assert await queue.heartbeat("w", [job], 10.0, now=109.0) == set()
    assert await queue.reap(now=118.0) == 0
    assert await queue.reap(now=119.0) == 1
    assert await queue.heartbeat("w", [job], 10.0, now=119.0) == {job.id}


async def test_job_of_a_silent_worker_runs_again(queue):
    job = await start_one(queue)
    assert await queue.reap(now=109.9) == 0
    assert await queue.reap(now=110.0) == 1
    [again] = await queue.claim("other", MODELS, 1, 10.0, now=111.0)
    assert (again.id, again.attempt, again.payload) == (job.id, 2, job.payload)
    assert await queue.complete("other", again, b"ok")


async def test_job_that_kills_its_workers_dies_in_the_end(queue):
    job = await start_one(queue, max_attempts=3)
    now = 100.0
    for _ in range(2):
        now += 10.0
        assert await queue.reap(now=now) == 1
        assert [again.id for again in await queue.claim("w", MODELS, 1, 10.0, now=now)] == [job.id]
    assert await queue.reap(now=now + 10) == 1
    view = await queue.get(job.id)
    assert (view.state, view.error.code, view.attempt) == (JobState.FAILED, "worker_lost", 3)
    assert "w went silent" in view.error.message


async def test_retries_back_off_exponentially_and_then_die(make_queue):
    queue = make_queue(Limits(backoff_s=1.0, max_backoff_s=3.0))
    job = await start_one(queue, max_attempts=4)
    now = 100.0
    for wait_s in (1.0, 2.0, 3.0):  # 4 s are capped to 3
        assert await queue.fail("w", job, BOOM, retry=True, now=now) is JobState.DELAYED
        assert await queue.reap(now=now + wait_s - 0.001) == 0
        assert await queue.claim("w", MODELS, 1, 10.0, now=now + wait_s - 0.001) == []
        now += wait_s
        assert await queue.reap(now=now) == 1
        [job] = await queue.claim("w", MODELS, 1, 100.0, now=now)
    assert await queue.fail("w", job, BOOM, retry=True, now=now) is JobState.FAILED
    view = await queue.get(job.id)
    assert (view.error, view.attempt) == (BOOM, 4)
    assert (await queue.stats(now=now)).dead == 1


async def test_given_delay_replaces_the_backoff(queue):
    job = await start_one(queue)
    assert await queue.fail("w", job, BOOM, retry=True, delay_s=0.0, now=100.0) is JobState.DELAYED
    assert await queue.reap(now=100.0) == 1


async def test_failure_without_retry_is_final_at_once(queue):
    job = await start_one(queue)
    assert await queue.fail("w", job, BOOM, retry=False) is JobState.FAILED
    assert (await queue.get(job.id)).error == BOOM


async def test_success_after_a_retry_carries_no_error(queue):
    job = await start_one(queue)
    await queue.fail("w", job, BOOM, retry=True, delay_s=0.0, now=100.0)
    assert (await queue.get(job.id)).error == BOOM
    await queue.reap(now=100.0)
    [again] = await queue.claim("w", MODELS, 1, 10.0, now=100.0)
    await queue.complete("w", again, b"ok")
    assert (await queue.get(job.id)).error is None


async def test_retry_past_the_deadline_does_not_run(queue):
    job = await start_one(queue, deadline_s=5.0)
    await queue.fail("w", job, BOOM, retry=True, delay_s=60.0, now=104.0)
    assert await queue.reap(now=105.0) == 1
    assert (await queue.get(job.id)).error == JobError(
        "deadline_exceeded",
        "the deadline passed before another attempt; the last one: boom: the backend broke",
    )


async def test_running_job_is_not_ended_by_its_deadline(queue):
    job = await start_one(queue, deadline_s=5.0)
    assert await queue.reap(now=106.0) == 0
    assert await queue.complete("w", job, b"ok", now=107.0)


async def test_retried_job_returns_to_the_head_of_its_queue(queue):
    job = await start_one(queue)
    await queue.enqueue([new(b"later")] * 3, now=100.0)
    await queue.fail("w", job, BOOM, retry=True, delay_s=0.0, now=100.0)
    await queue.reap(now=100.0)
    assert [next_.id for next_ in await queue.claim("w", MODELS, 1, 10.0, now=100.0)] == [job.id]


async def test_released_jobs_return_in_order_and_burn_no_attempt(queue):
    await queue.enqueue([new(b"%d" % i, max_attempts=1) for i in range(6)], now=100.0)
    batch = await queue.claim("w", MODELS, 3, 10.0, now=100.0)
    assert await queue.release("w", batch) == 3
    again = await queue.claim("w2", MODELS, 4, 10.0, now=100.0)
    assert [job.payload for job in again] == [b"0", b"1", b"2", b"3"]
    assert [job.attempt for job in again] == [2, 2, 2, 1]
    assert not await queue.complete("w", batch[0], b"late")  # the token is new, the old one is void
    for job in again:
        assert await queue.complete("w2", job, b"ok")


async def test_job_that_returns_to_an_emptied_queue_is_still_ahead_of_newer_ones(queue):
    """Its tag is of a busy period that has ended; new jobs start again from 0."""
    await queue.enqueue([new()] * 5, now=100.0)
    *_, last = await queue.claim("w", MODELS, 5, 10.0, now=100.0)
    await queue.enqueue([new(b"newer")] * 3, now=101.0)
    await queue.release("w", [last])
    assert [job.id for job in await queue.claim("w", MODELS, 1, 10.0, now=102.0)] == [last.id]


async def test_released_job_does_not_look_started(queue):
    job = await start_one(queue)
    await queue.release("w", [job])
    view = await queue.get(job.id)
    assert (view.state, view.started_at) == (JobState.QUEUED, None)


async def test_release_of_nothing_is_nothing(queue):
    assert await queue.release("w", []) == 0
    assert await queue.heartbeat("w", [], 10) == set()


async def test_worker_learns_of_a_cancel_at_its_heartbeat(queue):
    await queue.enqueue([new()] * 2)
    kept, dropped = await queue.claim("w", MODELS, 2, 10.0)
    assert await queue.cancel(dropped.id)
    assert await queue.heartbeat("w", [kept, dropped], 10.0) == {dropped.id}
    assert not await queue.complete("w", dropped, b"too late")
    view = await queue.get(dropped.id)
    assert (view.state, view.result) == (JobState.CANCELLED, None)


async def test_delayed_job_can_be_cancelled(queue):
    job = await start_one(queue)
    await queue.fail("w", job, BOOM, retry=True, now=100.0)
    assert await queue.cancel(job.id)
    assert await queue.reap(now=1000.0) == 0


async def test_finished_job_cannot_be_cancelled(queue):
    job = await start_one(queue)
    await queue.complete("w", job, b"ok")
    assert not await queue.cancel(job.id)
    assert (await queue.get(job.id)).state is JobState.DONE


async def test_dead_letter_runs_again_after_replay(queue):
    job = await start_one(queue, max_attempts=1, deadline_s=1.0)
    await queue.fail("w", job, BOOM, retry=True, now=100.0)
    assert await queue.replay_dead(job.id, now=200.0)
    assert not await queue.replay_dead(job.id, now=200.0)
    view = await queue.get(job.id)
    assert (view.state, view.error, view.finished_at) == (JobState.QUEUED, None, None)
    [again] = await queue.claim("w", MODELS, 1, 10.0, now=200.0)
    assert (again.payload, again.attempt) == (job.payload, 2)
    assert await queue.fail("w", again, BOOM, retry=True, now=200.0) is JobState.FAILED  # a budget of one


async def test_only_dead_letters_can_be_replayed(queue):
    job = await start_one(queue)
    assert not await queue.replay_dead(job.id)
    await queue.complete("w", job, b"ok")
    assert not await queue.replay_dead(job.id)
    assert not await queue.replay_dead("nothing")


async def test_a_replayed_job_has_made_no_step_yet(queue):
    job = await start_one(queue, max_attempts=1)
    await queue.step_done("w", [job], "3 of 4", [])
    await queue.fail("w", job, BOOM, retry=False)
    await queue.replay_dead(job.id)
    assert await queue.last_step(job.id) is None


async def test_a_failure_that_is_not_kept_is_no_dead_letter(make_queue, client):
    queue = make_queue(Limits(dead_ttl_s=600.0, result_ttl_s=60.0))
    job = await start_one(queue)
    assert await queue.fail("w", job, BOOM, retry=False, keep=False, now=101.0) is JobState.FAILED
    assert (await queue.get(job.id)).error == BOOM
    assert (await queue.stats(now=101.0)).dead == 0
    assert not await queue.replay_dead(job.id, now=101.0)
    assert not await client.hexists(queue.keys.job(job.id), "payload")
    assert 59_000 < await client.pttl(queue.keys.job(job.id)) <= 60_000


async def test_only_the_newest_dead_letters_are_kept(make_queue):
    queue = make_queue(Limits(max_dead=2))
    ids = []
    for i in range(4):
        job = await start_one(queue, now=100.0 + i)
        await queue.fail("w", job, BOOM, retry=False, now=100.0 + i)
        ids.append(job.id)
    assert (await queue.stats(now=104.0)).dead == 2
    assert [await queue.replay_dead(job_id, now=104.0) for job_id in ids] == [False, False, True, True]
    assert (await queue.get(ids[0])).state is JobState.FAILED  # its error can still be read


async def test_old_dead_letters_are_forgotten(make_queue, client):
    queue = make_queue(Limits(dead_ttl_s=600.0, result_ttl_s=60.0))
    for now in (100.0, 701.0):
        job = await start_one(queue, now=now)
        await queue.fail("w", job, BOOM, retry=False, now=now)
    assert await client.zrange(f"{queue.keys.tag}:dead", 0, -1) == [job.id.encode()]


async def test_results_expire_after_their_time(make_queue, client):
    queue = make_queue(Limits(result_ttl_s=60.0, dead_ttl_s=600.0, idempotency_ttl_s=30.0))
    done = await start_one(queue)
    await queue.complete("w", done, b"ok")
    failed = await start_one(queue)
    await queue.fail("w", failed, BOOM, retry=False)
    await queue.enqueue([new()], idempotency_key="k")
    assert 59_000 < await client.pttl(queue.keys.job(done.id)) <= 60_000
    assert 599_000 < await client.pttl(queue.keys.job(failed.id)) <= 600_000
    [key] = [key async for key in client.scan_iter(match=queue.keys.tag + ":idem:*")]
    assert 29_000 < await client.pttl(key) <= 30_000


async def test_payload_of_a_finished_job_is_not_kept(queue, client):
    done = await start_one(queue)
    await queue.complete("w", done, b"ok")
    [cancelled] = (await queue.enqueue([new()])).ids
    await queue.cancel(cancelled)
    for job_id in (done.id, cancelled):
        assert not await client.hexists(queue.keys.job(job_id), "payload")


async def test_idle_queue_holds_no_key_without_ttl(queue, client):
    """Whatever happened before: when no job lives, every key left expires by itself."""
    await queue.enqueue([new(tenant="a"), new(tenant="a", bucket="b", deadline_s=9.0)], idempotency_key="k")
    await queue.enqueue([new(tenant="b")] * 3)
    await queue.cancel((await queue.enqueue([new(tenant="c")])).ids[0])
    while jobs := await queue.claim("w", MODELS, 2, 10.0):
        await queue.complete("w", jobs[0], b"ok")
        for job in jobs[1:]:
            await queue.fail("w", job, BOOM, retry=False)
    keys = [key async for key in client.scan_iter(match=queue.keys.pattern())]
    assert keys
    assert [key for key in keys if await client.pttl(key) == -1] == []


async def test_stats_count_what_is_where(queue):
    await queue.enqueue([new()] * 4, now=100.0)
    await queue.enqueue([new(model="other@1")], now=103.0)
    first, second, _ = await queue.claim("w", MODELS, 3, 10.0, now=104.0)
    await queue.fail("w", first, BOOM, retry=True, now=104.0)
    await queue.fail("w", second, BOOM, retry=False, now=104.0)
    stats = await queue.stats(now=105.0)
    assert stats.queued == {"emoji@1": 1, "other@1": 1}
    assert (stats.running, stats.delayed, stats.dead) == (1, 1, 1)
    assert stats.oldest_age_s == 5.0


async def test_the_oldest_job_of_long_work_is_told_apart(queue):
    """A video may wait for an hour; a picture that waits a minute is somebody's alarm."""
    await queue.enqueue([new(model="video@1", bucket="video@1:64x64:long")], now=100.0)
    await queue.enqueue([new()], now=103.0)
    stats = await queue.stats(now=105.0)
    assert (stats.oldest_short_s, stats.oldest_long_s, stats.oldest_age_s) == (2.0, 5.0, 5.0)


async def test_reaper_moves_more_than_one_script_call_allows(queue):
    await queue.enqueue([new()] * 450, now=100.0)
    assert len(await queue.claim("w", MODELS, 450, 10.0, now=100.0)) == 450
    assert await queue.reap(now=200.0) == 450
    assert (await queue.stats(now=200.0)).queued == {"emoji@1": 450}


async def test_retries_do_not_need_admission(make_queue):
    queue = make_queue(Limits(max_queued=1))
    job = await start_one(queue)
    await queue.fail("w", job, BOOM, retry=True, delay_s=0.0, now=100.0)
    with pytest.raises(QueueFull):
        await queue.enqueue([new()])
    assert await queue.reap(now=100.0) == 1


async def test_keep_reaping_goes_on_until_cancelled(queue, wait_until):
    await queue.enqueue([new()])
    [job] = await queue.claim("w", MODELS, 1, 0.001)
    reaper = asyncio.create_task(queue.keep_reaping(0.05, interval_s=0.1))

    async def is_queued() -> bool:
        return (await queue.get(job.id)).state is JobState.QUEUED

    await wait_until(is_queued)
    reaper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reaper


async def reap_from(queue, sparing, start, end, every_s=1.0):
    """Reap again and again from start to end, as `keep_reaping` does; return when something was moved, if it was."""
    now = start
    while now <= end:
        if await queue.reap(now=now, sparing=sparing):
            return now
        now += every_s
    return None


def sparing_for_10_s() -> Sparing:
    return Sparing(lease_ms=10_000, most_apart_ms=4_000)


async def test_a_reap_that_runs_long_after_it_was_sent_leaves_leases_alone(queue):
    """The server froze; the call was given up, but ran when the server went on: before the heartbeats."""
    sparing = sparing_for_10_s()
    assert await reap_from(queue, sparing, 80.0, 100.0) is None
    job = await start_one(queue)
    assert await queue.reap(now=111.5, sparing=sparing) == 0
    assert await queue.heartbeat("w", [job], 10.0, now=111.6) == set()
    assert await reap_from(queue, sparing, 112.0, 125.0) == 122.0  # it fell silent after all


async def test_a_short_pause_does_not_keep_the_jobs_of_a_lost_worker(queue):
    sparing = sparing_for_10_s()
    assert await reap_from(queue, sparing, 80.0, 100.0) is None
    await start_one(queue)
    assert await reap_from(queue, sparing, 100.0, 120.0, every_s=3.9) == pytest.approx(111.7)


async def test_who_begins_to_reap_leaves_leases_for_the_time_of_one(queue):
    """An API that started as the queue came back took the jobs of all workers: no lease was renewed yet."""
    await start_one(queue)
    assert await reap_from(queue, sparing_for_10_s(), 200.0, 220.0) == 210.0


async def test_leases_are_not_left_for_ever_by_a_clock_that_went_back(queue):
    sparing = sparing_for_10_s()
    await queue.reap(now=9_000.0, sparing=sparing)
    await start_one(queue)
    assert await reap_from(queue, sparing, 111.0, 130.0) == 121.0


async def test_a_server_that_freezes_takes_no_job_from_a_worker_that_lives(queue, client):
    """Its clock went on, and what had been sent to it ran afterwards in that order: the reaper's call came first."""
    [seconds, micros] = await client.time()
    sparing = Sparing(lease_ms=200, most_apart_ms=100, heard_ms=seconds * 1000 + micros // 1000)
    await queue.enqueue([new()])
    jobs = await queue.claim("alive", MODELS, 1, 0.2)
    await client.client_pause(400)
    moved, lost = await asyncio.gather(queue.reap(sparing=sparing), queue.heartbeat("alive", jobs, 10.0))
    assert (moved, lost) == (0, set())


async def test_after_an_outage_no_lease_is_reaped_before_those_who_live_have_renewed_theirs(
    queue, wait_until, monkeypatch
):
    """An outage longer than the lease took every live worker's jobs: the reaper was faster than its heartbeat."""
    await queue.enqueue([new()] * 3)
    [held] = await queue.claim("alive", MODELS, 1, 0.001)
    [lost] = await queue.claim("dead", MODELS, 1, 0.001)
    [failed] = await queue.claim("alive", MODELS, 1, 0.001)
    await queue.fail("alive", failed, BOOM, retry=True, delay_s=0.0)
    lease_s, reap, is_away, reaped = 1.0, queue.reap, True, []

    async def watched(**options):
        if is_away:
            raise QueueUnavailable("planted")
        reaped.append(await reap(**options))

    monkeypatch.setattr(queue, "reap", watched)
    reaper = asyncio.create_task(queue.keep_reaping(lease_s, interval_s=0.005))
    end = asyncio.get_running_loop().time() + lease_s / 2

    async def lasted() -> bool:
        return asyncio.get_running_loop().time() > end

    async def has_reaped() -> bool:
        return bool(reaped)

    async def is_taken_from_the_dead() -> bool:
        return (await queue.get(lost.id)).state is JobState.QUEUED

    await wait_until(lasted)
    is_away = False
    await wait_until(has_reaped)
    assert (await queue.get(failed.id)).state is JobState.QUEUED  # what is no lease does not wait
    assert await queue.heartbeat("alive", [held], 10.0) == set()
    await wait_until(is_taken_from_the_dead)
    assert (await queue.get(held.id)).state is JobState.RUNNING
    reaper.cancel()
    await asyncio.gather(reaper, return_exceptions=True)


async def test_cancelled_call_stays_cancelled(queue):
    """On Python 3.11 redis-py's asyncio.wait_for swallowed a cancellation now and then.

    keep_reaping then ran on after its cancel, and whoever awaited it hung.
    """

    async def call_for_ever() -> None:
        while True:
            await queue.get("nothing")

    for i in range(1500):
        task = asyncio.create_task(call_for_ever())
        for _ in range(i % 13):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=2.0)
        assert done, f"cancellation {i} was swallowed"
