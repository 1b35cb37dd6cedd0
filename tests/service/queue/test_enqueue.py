"""Admission and idempotency: all rows of a request or none, and the same request only once."""

import asyncio

import pytest

from flashbulb_service.errors import DeadlineUnreachable, IdempotencyConflict, QueueFull
from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.queue import Limits
from flashbulb_service.scheduler import BucketFacts, plan_batch
from flashbulb_service.simulate import admits
from flashbulb_service.timing import Tau


def new(payload: bytes = b"p", **kwargs) -> NewJob:
    return NewJob(**{"model": "emoji@1", "bucket": "64x64", "payload": payload, **kwargs})


async def test_enqueued_jobs_can_be_read(queue):
    enqueued = await queue.enqueue([new(b"a"), new(b"b")], now=100.0)
    assert enqueued.created
    for job_id in enqueued.ids:
        view = await queue.get(job_id)
        assert (view.state, view.model, view.bucket, view.attempt) == (
            JobState.QUEUED,
            "emoji@1",
            "64x64",
            0,
        )
        assert view.enqueued_at == 100.0
        assert (view.started_at, view.finished_at, view.result, view.error) == (None, None, None, None)


async def test_unknown_job_is_none(queue):
    assert await queue.get("nothing") is None


async def test_payload_arrives_byte_for_byte(queue):
    payload = bytes(range(256)) * 3
    await queue.enqueue([new(payload)])
    [job] = await queue.claim("w", ["emoji@1"], 1, 5)
    assert job.payload == payload


async def test_server_clock_is_used_when_no_time_is_given(queue, client):
    seconds, micros = await client.time()
    [job_id] = (await queue.enqueue([new()])).ids
    assert abs((await queue.get(job_id)).enqueued_at - (seconds + micros / 1e6)) < 5


async def test_request_over_the_total_limit_stores_no_row(make_queue):
    queue = make_queue(Limits(max_queued=3))
    await queue.enqueue([new()] * 2)
    with pytest.raises(QueueFull) as refused:
        await queue.enqueue([new()] * 2)
    assert refused.value.scope == "total"
    assert (await queue.stats()).queued == {"emoji@1": 2}
    await queue.enqueue([new()])  # the last place is still free


async def test_request_over_the_tenants_limit_leaves_other_tenants_free(make_queue):
    queue = make_queue(Limits(max_queued_per_tenant=2))
    await queue.enqueue([new(tenant="a")] * 2)
    with pytest.raises(QueueFull) as refused:
        await queue.enqueue([new(tenant="a")])
    assert refused.value.scope == "tenant"
    await queue.enqueue([new(tenant="b")] * 2)


async def test_running_jobs_count_until_they_end(make_queue):
    queue = make_queue(Limits(max_queued=1))
    await queue.enqueue([new()])
    [job] = await queue.claim("w", ["emoji@1"], 1, 5)
    with pytest.raises(QueueFull):
        await queue.enqueue([new()])
    await queue.complete("w", job, b"")
    await queue.enqueue([new()])


async def test_retry_after_is_the_time_to_drain_at_the_measured_rate(make_queue):
    queue = make_queue(Limits(max_queued=40, default_retry_after_s=7.0))
    await queue.enqueue([new()] * 40, now=1000.0)
    with pytest.raises(QueueFull) as unmeasured:
        await queue.enqueue([new()], now=1000.0)
    assert unmeasured.value.retry_after_s == 7.0
    for job in await queue.claim("w", ["emoji@1"], 20, 60, now=1005.0):
        await queue.complete("w", job, b"", now=1005.0)
    # 20 live and 30 new are 10 too many
    with pytest.raises(QueueFull) as measured:
        await queue.enqueue([new()] * 30, now=1010.0)
    assert measured.value.retry_after_s == pytest.approx(5.0)  # 20 in the 10 s since 1000: 2 per second


async def test_same_key_returns_the_first_ids(queue):
    first = await queue.enqueue([new(b"a"), new(b"b")], idempotency_key="k")
    again = await queue.enqueue([new(b"a"), new(b"b")], idempotency_key="k")
    assert (first.created, again.created) == (True, False)
    assert first.ids == again.ids
    assert (await queue.stats()).queued == {"emoji@1": 2}


async def test_concurrent_requests_with_one_key_create_once(make_queue):
    queues = [make_queue() for _ in range(4)]
    results = await asyncio.gather(
        *(q.enqueue([new()], idempotency_key="k") for q in queues for _ in range(5))
    )
    assert sum(result.created for result in results) == 1
    assert len({result.ids for result in results}) == 1


@pytest.mark.parametrize("changed", [{"payload": b"x"}, {"bucket": "128x128"}, {"cost": 2.0}])
async def test_same_key_with_another_request_is_a_conflict(queue, changed):
    await queue.enqueue([new()], idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        await queue.enqueue([new(**changed)], idempotency_key="k")


async def test_keys_of_different_tenants_are_different_keys(queue):
    first = await queue.enqueue([new(tenant="a")], idempotency_key="k")
    other = await queue.enqueue([new(b"other", tenant="b")], idempotency_key="k")
    assert first.ids != other.ids


async def test_request_digest_decides_what_is_the_same_request(queue):
    first = await queue.enqueue([new(b"seed 1")], idempotency_key="k", request_digest="prompt")
    again = await queue.enqueue([new(b"seed 2")], idempotency_key="k", request_digest="prompt")
    assert again.ids == first.ids
    with pytest.raises(IdempotencyConflict):
        await queue.enqueue([new(b"seed 1")], idempotency_key="k", request_digest="other prompt")


async def test_refused_request_does_not_use_up_its_key(make_queue):
    queue = make_queue(Limits(max_queued=1))
    [blocker] = (await queue.enqueue([new()])).ids
    with pytest.raises(QueueFull):
        await queue.enqueue([new(b"mine")], idempotency_key="k")
    await queue.cancel(blocker)
    assert (await queue.enqueue([new(b"mine")], idempotency_key="k")).created


async def test_replay_works_while_the_queue_is_full(make_queue):
    queue = make_queue(Limits(max_queued=1))
    first = await queue.enqueue([new()], idempotency_key="k")
    assert (await queue.enqueue([new()], idempotency_key="k")).ids == first.ids


async def test_key_whose_results_have_expired_starts_anew(queue, client):
    [gone] = (await queue.enqueue([new()], idempotency_key="k")).ids
    [job] = await queue.claim("w", ["emoji@1"], 1, 5)
    await queue.complete("w", job, b"")
    await client.delete(queue.keys.job(gone))  # what its TTL will do
    again = await queue.enqueue([new()], idempotency_key="k")
    assert again.created
    assert again.ids != (gone,)


async def test_script_sent_twice_by_the_client_library_enqueues_once(queue, monkeypatch):
    """A connection that breaks before the answer makes redis-py send the same arguments again."""
    run = queue._run

    async def twice(script, *args):
        await run(script, *args)
        return await run(script, *args)

    monkeypatch.setattr(queue, "_run", twice)
    enqueued = await queue.enqueue([new(b"a"), new(b"b")])
    assert enqueued.created
    monkeypatch.undo()
    assert (await queue.stats()).queued == {"emoji@1": 2}


async def test_empty_and_mixed_requests_are_refused(queue):
    with pytest.raises(ValueError, match="at least one job"):
        await queue.enqueue([])
    with pytest.raises(ValueError, match="one tenant"):
        await queue.enqueue([new(tenant="a"), new(tenant="b")])


TAU = Tau(17.0, 4.3, 4.93)  # a batch of 8 takes 43.74 ms


async def admit(queue, num, deadline_s, now=100.0, tenant="default"):
    return await queue.enqueue([new(deadline_s=deadline_s, tenant=tenant)] * num, now=now)


async def test_a_deadline_that_its_place_in_the_queue_cannot_keep_is_refused_and_nothing_is_stored(queue):
    await queue.publish_times("w", {("emoji@1", "64x64"): (TAU, 8)}, 6.0, now=100.0)
    await admit(queue, 8, 0.100)
    await admit(queue, 8, 0.100)  # the second batch ends at 87.48 ms
    with pytest.raises(DeadlineUnreachable) as refused:
        await admit(queue, 1, 0.100)
    assert (refused.value.code, refused.value.retry_after_s) == ("deadline_unreachable", 0.1)
    await admit(queue, 1, 0.110)  # the third, with one row, would end at 104.48
    assert (await queue.stats(now=100.0)).queued == {"emoji@1": 17}


async def test_admission_counts_every_live_worker_and_no_other(queue):
    times = {("emoji@1", "64x64"): (TAU, 8)}
    for worker in ("w1", "w2"):
        await queue.publish_times(worker, times, 6.0, now=100.0)
    await admit(queue, 32, 0.100)  # two batches each
    with pytest.raises(DeadlineUnreachable):
        await admit(queue, 1, 0.100)
    await admit(queue, 50, 0.010, now=107.0)  # nobody lives, so nothing is known


async def test_admission_counts_the_batch_that_runs(queue):
    await queue.publish_times("w", {("emoji@1", "64x64"): (TAU, 8)}, 6.0, now=100.0)
    await admit(queue, 8, 0.100)
    await queue.claim(
        "w",
        ["emoji@1"],
        8,
        60,
        plan=lambda window: plan_batch(window, lambda _model, _bucket: BucketFacts(8, TAU)),
        now=100.0,
    )
    with pytest.raises(DeadlineUnreachable):
        await admit(queue, 1, 0.060)  # 43.74 ms of the running one, 17 of the own
    await admit(queue, 1, 0.061)


async def test_a_tight_deadline_is_admitted_while_its_batch_is_small_enough(queue):
    await queue.publish_times("w", {("emoji@1", "64x64"): (TAU, 8)}, 6.0, now=100.0)
    await admit(queue, 2, 0.020)  # a batch of 2 takes 17 ms
    with pytest.raises(DeadlineUnreachable):
        await admit(queue, 2, 0.020)  # one of 4 takes 24


async def test_anothers_backlog_does_not_refuse_a_polite_tenant(queue):
    await queue.publish_times("w", {("emoji@1", "64x64"): (TAU, 8)}, 6.0, now=100.0)
    await queue.enqueue([new(tenant="flood")] * 100, now=40.1)  # due at the polite one's time or before
    await admit(queue, 1, 0.100, tenant="polite")


@pytest.mark.parametrize("served_by", ["w", "other"])
async def test_work_of_other_buckets_counts_where_the_same_worker_does_it(queue, served_by):
    await queue.publish_times("w", {("emoji@1", "64x64"): (TAU, 8)}, 6.0, now=100.0)
    await queue.publish_times(served_by, {("emoji@1", "128x128"): (TAU, 8)}, 6.0, now=100.0)
    await queue.publish_times("w", {("emoji@1", "128x128:long"): (TAU, 8)}, 6.0, now=100.0)
    for bucket, due_s in (("128x128", -60), ("128x128", 60), ("128x128:long", -60)):
        await queue.enqueue([new(bucket=bucket)] * 12, now=100.0 + due_s)
    if (
        served_by == "w"
    ):  # 12 rows that are due before ours: 65.61 ms; not those due later, nor those of the long lane
        with pytest.raises(DeadlineUnreachable):
            await admit(queue, 1, 0.082)
    await admit(queue, 1, 0.083)


async def test_another_tenants_backlog_in_another_bucket_does_not_refuse_a_polite_one(queue):
    for bucket in ("64x64", "128x128"):
        await queue.publish_times("w", {("emoji@1", bucket): (TAU, 8)}, 6.0, now=100.0)
    await queue.enqueue([new(tenant="flood", bucket="128x128")] * 100, now=40.0)
    await admit(queue, 1, 0.100, tenant="polite")


async def test_jobs_without_a_deadline_are_admitted_by_count_alone(queue):
    await queue.publish_times("w", {("emoji@1", "64x64"): (TAU, 8)}, 6.0, now=100.0)
    await queue.enqueue([new()] * 500, now=100.0)


@pytest.mark.parametrize("allowed_ms", [16, 18, 43, 44, 60, 87, 88, 130, 132, 176])
@pytest.mark.parametrize(("waiting", "is_busy"), [(0, False), (0, True), (7, True), (8, True), (17, True)])
@pytest.mark.parametrize("elsewhere", [0, 3])
async def test_the_simulation_admits_what_the_queue_admits(queue, waiting, is_busy, elsewhere, allowed_ms):
    times = {("emoji@1", bucket): (TAU, 8) for bucket in ("64x64", "128x128")}
    await queue.publish_times("w", times, 6.0, now=100.0)
    if is_busy:
        await queue.enqueue([new()], now=30.0)
        await queue.claim(
            "w",
            ["emoji@1"],
            8,
            60,
            plan=lambda window: plan_batch(window, lambda _model, _bucket: BucketFacts(8, TAU)),
            now=100.0,
        )
    if waiting:
        await queue.enqueue([new()] * waiting, now=40.0)
    if elsewhere:
        await queue.enqueue([new(bucket="128x128")] * elsewhere, now=40.0)
    others_ms = elsewhere / TAU.throughput(8)
    expected = admits([17.0 * is_busy], waiting, TAU, 8, allowed_ms, others_ms)
    if expected:
        await admit(queue, 1, allowed_ms / 1000)
    else:
        with pytest.raises(DeadlineUnreachable):
            await admit(queue, 1, allowed_ms / 1000)
