"""Which jobs a worker gets: one bucket, fair shares, priorities, deadlines."""

import asyncio

import pytest

from flashbulb_service.errors import JobNotFound, QueueUnavailable
from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.queue import Limits
from flashbulb_service.queue import queue as queue_module
from flashbulb_service.scheduler import BucketFacts, Plan, Window, plan_batch
from flashbulb_service.timing import Tau


def new(payload: bytes = b"p", **kwargs) -> NewJob:
    return NewJob(**{"model": "emoji@1", "bucket": "64x64", "payload": payload, **kwargs})


async def drain(queue, models=("emoji@1",), max_batch=1) -> list[bytes]:
    """Claim until nothing is left; payloads in the order served."""
    served = []
    while jobs := await queue.claim("w", models, max_batch, 60):
        served += [job.payload for job in jobs]
    return served


async def test_claim_of_nothing_is_empty(queue):
    assert await queue.claim("w", ["emoji@1"], 8, 5) == []
    assert await queue.claim("w", [], 8, 5) == []


async def test_one_tenants_jobs_come_in_order(queue):
    await queue.enqueue([new(b"%d" % i) for i in range(5)])
    await queue.enqueue([new(b"%d" % i) for i in range(5, 8)])
    assert await drain(queue, max_batch=3) == [b"%d" % i for i in range(8)]


async def test_batch_is_of_one_bucket_of_one_model(queue):
    for model in ("emoji@1", "other@1"):
        for bucket in ("64x64", "128x128"):
            await queue.enqueue([new(model=model, bucket=bucket)] * 3)
    batches = []
    while jobs := await queue.claim("w", ["emoji@1", "other@1"], 8, 60):
        assert len({(job.model, job.bucket) for job in jobs}) == 1
        batches.append(len(jobs))
    assert batches == [3, 3, 3, 3]


async def test_batch_is_at_most_max_batch(queue):
    await queue.enqueue([new()] * 10)
    assert len(await queue.claim("w", ["emoji@1"], 4, 5)) == 4
    with pytest.raises(ValueError, match="max_batch"):
        await queue.claim("w", ["emoji@1"], 0, 5)


async def test_other_models_are_left_alone(queue):
    await queue.enqueue([new(model="other@1")])
    assert await queue.claim("w", ["emoji@1"], 8, 5) == []
    assert (await queue.stats()).queued == {"other@1": 1}


async def test_worker_is_not_hidden_behind_many_foreign_buckets(queue):
    """The prototype scanned only the first 64 due buckets of all models."""
    for i in range(100):
        await queue.enqueue([new(model="other@1", bucket=f"b{i}")], now=1.0)
    await queue.enqueue([new(b"mine")], now=2.0)
    assert [job.payload for job in await queue.claim("w", ["emoji@1"], 8, 5, now=3.0)] == [b"mine"]


async def test_model_that_waited_longest_is_served_first(queue):
    await queue.enqueue([new(model="b@1")], now=1.0)
    await queue.enqueue([new(model="a@1")], now=2.0)
    [job] = await queue.claim("w", ["a@1", "b@1"], 8, 5, now=3.0)
    assert job.model == "b@1"


async def test_late_tenant_shares_with_one_that_queued_a_hundred(queue):
    await queue.enqueue([new(b"A%d" % i, tenant="A") for i in range(100)])
    await queue.enqueue([new(b"B%d" % i, tenant="B") for i in range(3)])
    served = await drain(queue)
    assert served[:6] == [b"A0", b"B0", b"A1", b"B1", b"A2", b"B2"]
    assert len(served) == 103


async def test_tenant_that_arrives_later_gets_its_share_from_then_on(queue):
    """Neither behind what the other queued in advance, nor with a claim on what it missed."""
    await queue.enqueue([new(b"A%d" % i, tenant="A") for i in range(20)])
    for _ in range(10):
        await queue.claim("w", ["emoji@1"], 1, 60)
    await queue.enqueue([new(b"B%d" % i, tenant="B") for i in range(4)])
    assert (await drain(queue))[:6] == [b"B0", b"A10", b"B1", b"A11", b"B2", b"A12"]


async def test_tenants_that_were_served_leave_no_trace_in_a_busy_queue(queue, client):
    """Without pruning, a queue that is never empty would remember every tenant it ever saw."""
    for i in range(20):
        await queue.enqueue([new(tenant=f"t{i}")])
    await queue.enqueue([new(tenant="busy")] * 12)
    for _ in range(25):
        await queue.claim("w", ["emoji@1"], 1, 60)
    assert await client.zrange(f"{queue.keys.tag}:used", 0, -1) == [b"busy"]


async def test_using_idle_capacity_is_not_held_against_a_tenant(queue):
    await queue.enqueue([new(tenant="A")] * 50)
    await drain(queue)
    await queue.enqueue([new(b"B%d" % i, tenant="B") for i in range(3)])
    await queue.enqueue([new(b"A%d" % i, tenant="A") for i in range(3)])
    assert await drain(queue) == [b"B0", b"A0", b"B1", b"A1", b"B2", b"A2"]


async def test_shares_are_of_cost_not_of_jobs(queue):
    await queue.enqueue([new(b"A%d" % i, tenant="A", cost=3.0) for i in range(3)])
    await queue.enqueue([new(b"B%d" % i, tenant="B", cost=1.0) for i in range(6)])
    assert await drain(queue) == [b"A0", b"B0", b"B1", b"B2", b"A1", b"B3", b"B4", b"B5", b"A2"]


async def test_fairness_holds_across_buckets(queue):
    await queue.enqueue([new(b"A", tenant="A", bucket="a")] * 20)
    await queue.enqueue([new(b"B", tenant="B", bucket="b")] * 20)
    assert (await drain(queue, max_batch=4))[:16] == [b"A"] * 4 + [b"B"] * 4 + [b"A"] * 4 + [b"B"] * 4


async def test_jobs_are_served_by_deadline_and_those_without_one_by_their_target(make_queue):
    queue = make_queue(Limits(default_slo_s=60.0))
    for payload, deadline_s in ((b"none", None), (b"90", 90.0), (b"5", 5.0), (b"30", 30.0)):
        await queue.enqueue([new(payload, deadline_s=deadline_s)], now=100.0)
    served = []
    while jobs := await queue.claim("w", ["emoji@1"], 1, 60, now=101.0):
        served += [job.payload for job in jobs]
    assert served == [b"5", b"30", b"none", b"90"]


async def test_priority_makes_a_job_due_earlier_by_a_bounded_time(make_queue):
    queue = make_queue(Limits(max_priority_ms=1500))
    for i in range(4):
        await queue.enqueue([new(b"%d" % i)], now=100.0 + i)
    await queue.enqueue([new(b"urgent", priority_ms=10**9)], now=103.0)
    assert await drain(queue) == [b"0", b"1", b"urgent", b"2", b"3"]


async def test_a_tenant_of_twice_the_weight_gets_twice_the_share(queue):
    await queue.enqueue([new(b"A", tenant="A", weight=2.0)] * 20)
    await queue.enqueue([new(b"B", tenant="B")] * 20)
    served = (await drain(queue))[:12]
    assert served.count(b"A") == 8 and served.count(b"B") == 4


async def test_a_tenant_pays_for_the_device_time_that_was_measured(queue):
    """Both were charged the same when their jobs were taken; one of them took six times as long."""
    for tenant in "AB":
        await queue.enqueue([new(tenant=tenant)] * 6)
    for job in [*await queue.claim("w", ["emoji@1"], 1, 60), *await queue.claim("w", ["emoji@1"], 1, 60)]:
        await queue.complete("w", job, b"", device_ms=600.0 if job.tenant == "A" else 100.0)
    window = await queue.window("w", ["emoji@1"], 12)
    assert window.used_ms == {"A": pytest.approx(600.0), "B": pytest.approx(100.0)}
    served = [(await queue.claim("w", ["emoji@1"], 1, 60))[0].tenant for _ in range(5)]
    assert served == ["B"] * 5


async def test_flooder_cannot_fill_the_window(queue):
    await queue.enqueue([new(tenant="flood")] * 200)
    await queue.enqueue([new(tenant="polite")])
    window = await queue.window("w", ["emoji@1"], 16)
    assert "polite" in {row.tenant for row in window.buckets[0].rows}
    assert len(window.buckets[0].rows) <= 17 and window.buckets[0].num_waiting == 201


async def test_only_what_is_still_queued_is_taken(queue):
    """Between the look and the take, another worker or a cancel may have come first."""
    ids = (await queue.enqueue([new()] * 4)).ids
    window = await queue.window("w", ["emoji@1"], 8)
    plan = plan_batch(window, lambda _model, _bucket: BucketFacts(cap=4))
    await queue.cancel(ids[0])
    await queue.claim("other", ["emoji@1"], 1, 60)
    assert [job.id for job in (await queue.take("w", plan, 60)).jobs] == list(ids[2:])
    assert (await queue.take("w", plan, 60)).jobs == []


async def test_planned_drop_ends_the_job_once(queue):
    hopeless, fine = (await queue.enqueue([new(deadline_s=5.0), new(deadline_s=50.0)], now=100.0)).ids
    tau = Tau(0.0, 0.0, 10_000.0, margin=1.2)
    plan = plan_batch(
        await queue.window("w", ["emoji@1"], 8, now=100.0), lambda _model, _bucket: BucketFacts(4, tau)
    )
    assert (plan.take, plan.drop) == ((fine,), (hopeless,))
    assert [job.id for job in (await queue.take("w", plan, 60, now=100.0)).jobs] == [fine]
    assert (await queue.get(hopeless)).error.code == "deadline_exceeded"


async def test_overdue_job_ends_failed_and_is_not_returned(queue):
    late, punctual = (await queue.enqueue([new(b"late", deadline_s=5.0), new(b"ok")], now=100.0)).ids
    [job] = await queue.claim("w", ["emoji@1"], 8, 60, now=105.0)
    assert job.id == punctual
    view = await queue.get(late)
    assert (view.state, view.error.code, view.finished_at) == (JobState.FAILED, "deadline_exceeded", 105.0)
    assert not await queue.replay_dead(late)  # nothing was wrong with it: no dead letter


async def test_the_places_of_overdue_jobs_go_to_those_behind_them(queue):
    """Even to those that the first look at the queue did not show."""
    await queue.enqueue([new(b"late", deadline_s=1.0)] * 7, now=0)
    await queue.enqueue([new(b"%d" % number, deadline_s=50.0) for number in range(4)], now=1)
    claimed = await queue.claim("w", ["emoji@1"], 4, 5, now=2)
    assert [job.payload for job in claimed] == [b"0", b"1", b"2", b"3"]


async def test_claim_goes_on_to_the_next_bucket_when_one_holds_only_overdue_jobs(queue):
    await queue.enqueue([new(bucket="a", deadline_s=1.0)] * 3, now=100.0)
    await queue.enqueue([new(b"ok", bucket="b")], now=100.0)
    assert [job.payload for job in await queue.claim("w", ["emoji@1"], 8, 60, now=102.0)] == [b"ok"]


async def test_job_before_its_deadline_is_claimed(queue):
    await queue.enqueue([new(deadline_s=5.0)], now=100.0)
    assert len(await queue.claim("w", ["emoji@1"], 8, 60, now=104.9)) == 1


async def test_reaper_ends_overdue_jobs_without_any_worker(queue):
    [job_id] = (await queue.enqueue([new(deadline_s=5.0)], now=100.0)).ids
    assert await queue.reap(now=104.0) == 0
    assert await queue.reap(now=106.0) == 1
    assert (await queue.get(job_id)).error.code == "deadline_exceeded"


async def test_cancelled_job_is_never_claimed(queue):
    first, second = (await queue.enqueue([new(), new()])).ids
    assert await queue.cancel(first)
    assert [job.id for job in await queue.claim("w", ["emoji@1"], 8, 60)] == [second]
    assert (await queue.get(first)).state is JobState.CANCELLED
    assert not await queue.cancel(first)


async def test_cancel_of_an_unknown_job_is_an_error(queue):
    with pytest.raises(JobNotFound):
        await queue.cancel("nothing")


async def test_concurrent_workers_never_get_the_same_job(make_queue):
    producer = make_queue()
    ids = (await producer.enqueue([new()] * 60)).ids
    workers = [make_queue() for _ in range(4)]

    async def work(name, queue):
        got = []
        while jobs := await queue.claim(name, ["emoji@1"], 3, 60):
            got += [job.id for job in jobs]
        return got

    got = await asyncio.gather(*(work(f"w{i}", queue) for i, queue in enumerate(workers)))
    assert sorted(job_id for part in got for job_id in part) == sorted(ids)


async def test_sleeping_worker_is_woken_by_an_enqueue(make_queue):
    worker, producer = make_queue(), make_queue()
    woken = asyncio.create_task(worker.wait_for_work(["other@1", "emoji@1"], 10))
    await producer.enqueue([new()])
    assert await asyncio.wait_for(woken, 5)


async def test_waiting_for_work_ends_at_its_timeout(queue):
    assert not await queue.wait_for_work(["emoji@1"], 0.02)


async def test_one_big_request_wakes_as_many_workers_as_it_feeds(make_queue):
    workers = [make_queue() for _ in range(4)]

    async def work(name, queue):
        while not (jobs := await queue.claim(name, ["emoji@1"], 2, 60)):
            assert await queue.wait_for_work(["emoji@1"], 10)
        return len(jobs)

    tasks = [asyncio.create_task(work(f"w{i}", queue)) for i, queue in enumerate(workers)]
    await make_queue().enqueue([new()] * 8)
    assert await asyncio.gather(*tasks) == [2, 2, 2, 2]


async def test_reaper_wakes_others_when_a_woken_worker_died_before_its_claim(queue, wait_until):
    await queue.enqueue([new()])
    assert await queue.wait_for_work(["emoji@1"], 1)  # takes the token, and is never heard of again
    other = asyncio.create_task(queue.wait_for_work(["emoji@1"], 10))
    await queue.reap()
    assert await other


async def test_drained_queue_does_not_wake_anybody(queue):
    await queue.enqueue([new()] * 3)
    await drain(queue)
    assert not await queue.wait_for_work(["emoji@1"], 0.02)


async def take_lone(queue, lone, models=("emoji@1", "other@1"), **now):
    plan = plan_batch(lone.window, lambda _model, _bucket: BucketFacts(cap=4))
    assert plan.take == (lone.job.id,)
    return await queue.take("w", plan, 60, models=models, lone=lone, **now)


async def test_the_only_job_is_claimed_by_its_wake_without_a_look_at_the_queue(queue):
    [job_id] = (await queue.enqueue([new("größer".encode(), tenant="a", deadline_s=50.0, weight=2.0)])).ids
    looked = await queue.window("w", ["emoji@1"], 8)
    lone = (await queue.wait_for_work(["other@1", "emoji@1"], 5)).lone
    assert lone.window.buckets == looked.buckets  # the token says what the window does
    assert lone.window.used_ms == looked.used_ms
    taken = await take_lone(queue, lone)
    assert taken.jobs == [lone.job]  # and it says what the claim returns
    assert taken.jobs[0].id == job_id
    assert not taken.more


async def test_a_wake_is_not_trusted_when_other_work_has_come(queue):
    """Else two jobs would run as two batches, or the more urgent one of another model would wait."""
    for other in (new(), new(model="other@1"), new(bucket="128x128")):
        await queue.enqueue([new()])
        lone = (await queue.wait_for_work(["emoji@1"], 5)).lone
        await queue.enqueue([other])
        taken = await take_lone(queue, lone)
        assert (taken.jobs, taken.more) == ([], True)
        await drain(queue, ["emoji@1", "other@1"], 4)


@pytest.mark.parametrize("is_lone", [True, False])
async def test_a_claim_whose_reply_is_lost_with_the_connection_finds_its_jobs_when_it_is_sent_again(
    queue, client, monkeypatch, is_lone
):
    """They were running, and nobody's: each waited for its lease to end and lost an attempt."""
    [job_id] = (await queue.enqueue([new(tenant="a")])).ids
    lone = (await queue.wait_for_work(["emoji@1"], 5)).lone if is_lone else None
    await queue.enqueue([new(model="behind@1")])  # the accounts last as long as anybody waits
    plan = Plan("emoji@1", "64x64", (job_id,), predicted_ms=5.0, charges_ms=(7.0,))
    send = queue._line.call

    async def send_twice(*command):
        await send(*command)
        return await send(*command)

    monkeypatch.setattr(queue._line, "call", send_twice)
    [job] = (await queue.take("w", plan, 60, models=["emoji@1"], lone=lone)).jobs
    assert (job.id, job.attempt, job.payload) == (job_id, 1, b"p")
    assert await client.zscore(f"{queue.keys.tag}:used", "a") == 7.0  # charged once
    assert (await queue.take("w", plan, 60, models=["emoji@1"])).jobs == []  # another call
    assert (await queue.take("other", plan, 60, models=["emoji@1"])).jobs == []


async def test_a_claim_that_is_given_up_in_an_outage_is_sent_again_until_it_is_answered(queue, monkeypatch):
    """The server froze and ran it afterwards: its jobs were running, and nobody's, since the next claim was another."""
    ids = (await queue.enqueue([new()] * 2)).ids
    take, num_calls = queue.take, 0

    async def unanswered_twice(*args, **options):
        nonlocal num_calls
        num_calls += 1
        taken = await take(*args, **options)
        if num_calls < 3:
            raise QueueUnavailable("planted")
        return taken

    monkeypatch.setattr(queue, "take", unanswered_twice)
    monkeypatch.setattr(queue_module, "BACKOFF_S", 0.0)

    def plan(window: Window) -> Plan | None:
        return plan_batch(window, lambda _model, _bucket: BucketFacts(8))

    jobs = (await queue.claim_next("w", ["emoji@1"], 8, 60, plan=plan, stop=asyncio.Event())).jobs
    assert [(job.id, job.attempt) for job in jobs] == [(job_id, 1) for job_id in ids]


async def test_a_claim_that_nothing_can_stop_is_sent_once(queue, monkeypatch):
    """`claim` never waits: it went on for ever without a server."""
    await queue.enqueue([new()])

    async def unanswered(*args, **options):
        raise QueueUnavailable("planted")

    monkeypatch.setattr(queue, "take", unanswered)
    with pytest.raises(QueueUnavailable, match="planted"):
        await queue.claim("w", ["emoji@1"], 8, 60)


@pytest.mark.parametrize("since", ["paused", "overdue"])
async def test_a_claim_that_comes_long_after_its_plan_takes_nothing_that_is_not_to_be_taken_any_more(
    queue, since
):
    """It was sent again after an outage, and drew for an operator who had paused the model, or for nobody."""
    (job_id,) = (await queue.enqueue([new(deadline_s=30.0)], now=100.0)).ids
    window = await queue.window("w", ["emoji@1"], 8, now=100.0)
    plan = plan_batch(window, lambda _model, _bucket: BucketFacts(8))
    assert plan is not None and plan.take == (job_id,)
    if since == "paused":
        await queue.set_gate("emoji@1", "paused")
    taken = await queue.take("w", plan, 60, models=["emoji@1"], now=101.0 if since == "paused" else 130.0)
    assert taken.jobs == []
    assert (await queue.get(job_id)).state is JobState.QUEUED


async def test_a_wake_is_trusted_beside_the_backlog_of_a_paused_model(queue):
    """Each picture that came alone was begun, refused for work that nobody may take, and drawn again."""
    await queue.enqueue([new(model="other@1")])
    await queue.set_gate("other@1", "paused")
    await queue.enqueue([new()])
    lone = (await queue.wait_for_work(["emoji@1"], 5)).lone
    taken = await take_lone(queue, lone)
    assert (taken.jobs, taken.more) == ([lone.job], False)


async def test_a_wake_is_not_trusted_when_it_is_old_or_its_model_is_paused_or_its_job_is_gone(queue):
    [job_id] = (await queue.enqueue([new()], now=100.0)).ids
    lone = (await queue.wait_for_work(["emoji@1"], 5)).lone
    assert (await take_lone(queue, lone, now=101.0)).jobs == []
    await queue.set_gate("emoji@1", "paused")
    assert (await take_lone(queue, lone, now=100.0)).jobs == []
    await queue.set_gate("emoji@1", None)
    await queue.cancel(job_id)
    assert (await take_lone(queue, lone, now=100.0)).jobs == []


@pytest.mark.parametrize("payload", [b"\xff\0", b"x" * 70_000])
async def test_a_payload_that_is_no_short_text_does_not_travel_with_a_wake(queue, payload):
    await queue.enqueue([new(payload)])
    wake = await queue.wait_for_work(["emoji@1"], 5)
    assert wake.lone is None
    [job] = await queue.claim("w", ["emoji@1"], 4, 60)
    assert job.payload == payload


async def test_long_work_is_not_claimed_by_a_wake(queue):
    """How much of it may run depends on what the other workers do."""
    await queue.enqueue([new(bucket="64x64:long")])
    wake = await queue.wait_for_work(["emoji@1"], 5)
    assert wake is not None
    assert wake.lone is None
