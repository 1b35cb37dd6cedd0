"""Waiting for jobs: pushed, once, and safe against lost events."""

import asyncio
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from flashbulb_service.errors import JobNotFound
from flashbulb_service.jobs import JobError, JobState, NewJob
from flashbulb_service.queue import Kept, Queue, completions
from flashbulb_service.queue import events as reader_of_events
from flashbulb_service.queue.views import read_news

MODELS = ["emoji@1"]


def new(payload: bytes = b"p", **kwargs) -> NewJob:
    return NewJob(**{"model": "emoji@1", "bucket": "64x64", "payload": payload, **kwargs})


class Way:
    """A way to the server on which connections die without a word to either side."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._dead: set[asyncio.StreamWriter] = set()
        self._said: dict[asyncio.StreamWriter, bytes] = {}  # by the server's side of a connection

    def kill(self, command: bytes) -> None:
        """Pass on nothing more of the connections on which a command went to the server."""
        self._dead |= {connection for connection, said in self._said.items() if command in said}

    async def pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(1 << 16):
            self._said[connection] = self._said.get(connection, b"") + data * (writer is connection)
            if connection not in self._dead:
                writer.write(data)
        writer.close()


@pytest.fixture
async def way(redis_url):
    parts, ends = urlsplit(redis_url), []

    async def connect(reader, writer) -> None:
        there, back = await asyncio.open_unix_connection(parts.path)
        ends.append(asyncio.gather(made.pass_on(reader, back, back), made.pass_on(there, writer, back)))

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as proxy:
        port, password = proxy.sockets[0].getsockname()[1], parts.query.removeprefix("password=")
        made = Way(f"redis://:{password}@127.0.0.1:{port}/0")
        yield made
        await asyncio.gather(*ends)


@pytest.fixture
def count_reads(monkeypatch):
    """Count how often a queue reads the state of the jobs that it waits for."""

    def count(queue: Queue) -> list[int]:
        calls = [0]
        run = queue._run

        async def counted(script, *args):
            calls[0] += script == "watch"
            return await run(script, *args)

        monkeypatch.setattr(queue, "_run", counted)
        return calls

    return count


async def subscribe(client, queue):
    """Listen on the channel of a queue from outside."""
    subscription = client.pubsub()
    await subscription.subscribe(queue.keys.done(queue.instance))
    assert (await subscription.get_message(timeout=5))["type"] == "subscribe"
    return subscription


async def events(subscription, client, queue) -> list[str]:
    """All events so far: what came before a marker of our own."""
    await client.publish(queue.keys.done(queue.instance), "marker")
    got = []
    while (message := await subscription.get_message(timeout=5)) is not None:
        if message["data"] == b"marker":
            return got
        got.append(read_news(message["data"]).id)
    raise AssertionError("the marker did not come back")


async def test_completion_is_pushed_to_the_waiter(make_queue, count_reads, wait_until):
    api, worker = make_queue(), make_queue()
    reads = count_reads(api)
    [job_id] = (await api.enqueue([new()])).ids
    timeout_s = 5.0
    assert timeout_s < completions.QUIET_S  # so only an event can end this wait
    waiting = asyncio.create_task(api.wait([job_id], timeout_s))

    async def subscribed() -> bool:
        return reads[0] == 2  # one read when the wait began, one when the subscription stood

    await wait_until(subscribed)
    [job] = await worker.claim("w", MODELS, 1, 5)
    await worker.complete("w", job, b"result")
    [view] = await waiting
    assert (view.id, view.state, view.result) == (job_id, JobState.DONE, b"result")
    assert reads[0] == 2


async def test_wait_returns_views_in_the_order_of_the_ids(make_queue):
    api, worker = make_queue(), make_queue()
    ids = (await api.enqueue([new(b"%d" % i) for i in range(5)])).ids
    wanted = [*reversed(ids), ids[0]]
    waiting = asyncio.create_task(api.wait(wanted, 5))
    for job in await worker.claim("w", MODELS, 8, 5):
        await worker.complete("w", job, job.payload)
    views = await waiting
    assert [view.id for view in views] == wanted
    assert [view.result for view in views] == [b"4", b"3", b"2", b"1", b"0", b"0"]


async def test_wait_for_ended_jobs_returns_at_once(queue):
    done, failed, cancelled = (await queue.enqueue([new()] * 3)).ids
    await queue.cancel(cancelled)
    first, second = await queue.claim("w", MODELS, 3, 5)
    await queue.complete("w", first, b"ok")
    await queue.fail("w", second, JobError("boom", "x"), retry=False)
    views = await queue.wait([done, failed, cancelled], 5)
    assert [view.state for view in views] == [JobState.DONE, JobState.FAILED, JobState.CANCELLED]


async def test_wait_ends_when_the_job_is_cancelled(make_queue):
    api, other = make_queue(), make_queue()
    [job_id] = (await api.enqueue([new()])).ids
    waiting = asyncio.create_task(api.wait([job_id], 5))
    assert await other.cancel(job_id)
    assert (await waiting)[0].state is JobState.CANCELLED


async def test_process_that_did_not_enqueue_is_told_too(make_queue, count_reads, wait_until):
    first, second, worker = make_queue(), make_queue(), make_queue()
    [job_id] = (await first.enqueue([new()])).ids
    reads = [count_reads(api) for api in (first, second)]
    waiting = [asyncio.create_task(api.wait([job_id], 5)) for api in (first, second, second)]

    async def subscribed() -> bool:
        return [calls[0] for calls in reads] == [2, 3]  # one per wait, one per subscription

    await wait_until(subscribed)
    [job] = await worker.claim("w", MODELS, 1, 5)
    await worker.complete("w", job, b"ok")
    assert [view.result for [view] in await asyncio.gather(*waiting)] == [b"ok"] * 3
    assert await subscribed()


async def test_wait_times_out_and_the_job_goes_on(queue):
    [job_id] = (await queue.enqueue([new()])).ids
    with pytest.raises(TimeoutError):
        await queue.wait([job_id], 0.02)
    assert (await queue.get(job_id)).state is JobState.QUEUED
    assert not queue._completions._waiters  # nothing is kept for a waiter that left


async def test_wait_for_an_unknown_job_is_an_error(queue):
    with pytest.raises(JobNotFound):
        await queue.wait(["nothing"], 5)


async def test_event_lost_with_the_connection_is_made_up_by_reading(make_queue, client, wait_until):
    api, worker = make_queue(), make_queue()
    [job_id] = (await api.enqueue([new()])).ids
    waiting = asyncio.create_task(api.wait([job_id], 10))
    channel = api.keys.done(api.instance)

    async def subscribed() -> bool:
        return dict(await client.pubsub_numsub(channel))[channel.encode()] == 1

    await wait_until(subscribed)
    [job] = await worker.claim("w", MODELS, 1, 5)
    [reader] = [c for c in await client.client_list(_type="pubsub") if c["sub"] == "1"]
    await client.client_kill_filter(_id=reader["id"])
    await client.publish(channel, "x")
    await worker.complete("w", job, b"ok")
    assert (await waiting)[0].result == b"ok"


async def test_a_subscription_that_has_died_without_a_word_is_made_again(
    way, namespace, monkeypatch, wait_until
):
    """It seemed to stand until the API was restarted, and every answer waited for the next look at the jobs."""
    monkeypatch.setattr(completions, "QUIET_S", 0.05)
    monkeypatch.setattr(completions, "ANSWER_S", 0.2)
    async with Queue.connect(way.url, namespace=namespace) as queue:
        await subscribed_queue(queue, wait_until)
        way.kill(b"SUBSCRIBE")
        before = queue._completions._subscriptions
        [job_id] = (await queue.enqueue([new()])).ids
        waiting = asyncio.create_task(queue.wait([job_id], 10))
        await wait_until(lambda: truth(queue._completions._subscriptions > before))
        await queue.cancel(job_id)
        assert (await waiting)[0].state is JobState.CANCELLED


async def test_events_are_read_on_where_their_connection_has_died_without_a_word(way, namespace, monkeypatch):
    """Its reader waited on it for ever, and no watcher of the process was told anything more."""
    monkeypatch.setattr(reader_of_events, "BLOCK_MS", 50)
    monkeypatch.setattr(reader_of_events, "CONNECT_TIMEOUT_S", 0.2)
    async with Queue.connect(way.url, namespace=namespace) as queue:
        [lead] = (await queue.enqueue([new()], keep=Kept(b"record", "me", events=True))).ids
        watching = queue.watch(lead, after="0", quiet_s=10)
        assert (await anext(watching)).kind == "queued"
        way.kill(b"XREAD")
        await queue.cancel(lead)
        assert (await anext(watching)).kind == "cancelled"
        await watching.aclose()


async def test_a_watch_begins_where_the_connection_that_wakes_its_reader_has_died_without_a_word(
    way, namespace, monkeypatch
):
    """It waited on it for ever: a new stream of events had no event, no ping and no end."""
    monkeypatch.setattr(reader_of_events, "BLOCK_MS", 50)
    monkeypatch.setattr(reader_of_events, "CONNECT_TIMEOUT_S", 0.2)
    async with Queue.connect(way.url, namespace=namespace) as queue:
        for _ in range(2):
            [lead] = (await queue.enqueue([new()], keep=Kept(b"record", "me", events=True))).ids
            watching = queue.watch(lead, after="0", quiet_s=10)
            async with asyncio.timeout(5):
                assert (await anext(watching)).kind == "queued"
            await watching.aclose()
            way.kill(b"XADD")


async def test_each_way_to_end_publishes_exactly_one_event(queue, client):
    subscription = await subscribe(client, queue)
    done, failed, dead, lost, cancelled, overdue = (
        await queue.enqueue(
            [new(), new(), new(max_attempts=1), new(max_attempts=1), new(), new(deadline_s=500.0)], now=100.0
        )
    ).ids
    jobs = await queue.claim("w", MODELS, 4, 10.0, now=100.0)
    assert [job.id for job in jobs] == [done, failed, dead, lost]
    boom = JobError("boom", "x")
    await queue.complete("w", jobs[0], b"ok")
    await queue.complete("w", jobs[0], b"ok")
    await queue.complete("thief", jobs[0], b"ok")
    await queue.fail("w", jobs[1], boom, retry=False)
    await queue.fail("w", jobs[1], boom, retry=False)
    await queue.fail("w", jobs[2], boom, retry=True)
    await queue.reap(now=150.0)
    await queue.reap(now=150.0)
    await queue.cancel(cancelled)
    await queue.cancel(cancelled)
    assert await queue.claim("w", MODELS, 8, 10.0, now=700.0) == []
    assert await events(subscription, client, queue) == [done, failed, dead, lost, cancelled, overdue]
    await subscription.aclose()


async def test_retry_and_release_publish_nothing(queue, client):
    subscription = await subscribe(client, queue)
    await queue.enqueue([new()] * 2, now=100.0)
    first, second = await queue.claim("w", MODELS, 2, 10.0, now=100.0)
    await queue.fail("w", first, JobError("boom", "x"), retry=True, now=100.0)
    await queue.release("w", [second])
    await queue.reap(now=200.0)
    assert await events(subscription, client, queue) == []
    await subscription.aclose()


async def test_news_of_an_end_tells_what_the_hash_does(queue, client):
    subscription = await subscribe(client, queue)
    done, failed, cancelled = (await queue.enqueue([new()] * 3)).ids
    await queue.cancel(cancelled)
    first, second = await queue.claim("w", MODELS, 3, 5)
    await queue.complete("w", first, b"a\0:-\xff", attached=b"3:-\0")
    await queue.fail("w", second, JobError("boom", "größer 5:-"), retry=False)
    told = []
    for _ in range(3):
        told.append(read_news((await subscription.get_message(timeout=5))["data"]))
    assert {view.id: view.attached for view in told} == {done: b"3:-\0", failed: None, cancelled: None}
    stored = {view.id: view for view in await queue.views([done, failed, cancelled])}
    assert {view.id: replace(view, attached=None) for view in told} == stored
    await subscription.aclose()


@pytest.mark.parametrize(
    "message", [b"", b"x", b"1:a", b"9:a", b"-5:a", b"1:a" + b"-" * 11, b"1:a4:done" + b"-" * 9]
)
def test_what_is_no_news_is_refused(message):
    with pytest.raises(ValueError, match=r"expected|invalid literal|not found"):
        read_news(message)


async def subscribed_queue(queue, wait_until) -> None:
    """Wait for a job, so that the subscription of this process stands."""
    [job_id] = (await queue.enqueue([new()])).ids
    await queue.cancel(job_id)
    await queue.wait([job_id], 5)
    await wait_until(lambda: truth(queue._completions._stands))


async def truth(value: bool) -> bool:
    return value


async def test_who_expects_the_end_reads_nothing(make_queue, count_reads, wait_until):
    api, worker = make_queue(), make_queue()
    await subscribed_queue(api, wait_until)
    reads = count_reads(api)
    enqueued = await api.enqueue([new()] * 2)
    first, second = await worker.claim("w", MODELS, 2, 5)
    await worker.complete("w", first, b"one", attached=b"picture")  # before anybody waits
    waiting = asyncio.create_task(api.wait(enqueued.ids, 5, expected=enqueued.expected))
    await worker.complete("w", second, b"two")
    assert [(view.result, view.attached) for view in await waiting] == [(b"one", b"picture"), (b"two", None)]
    assert reads == [0]


async def test_an_end_that_was_expected_through_a_broken_connection_is_read(
    make_queue, client, count_reads, wait_until
):
    api, worker = make_queue(), make_queue()
    await subscribed_queue(api, wait_until)
    reads = count_reads(api)
    enqueued = await api.enqueue([new()])
    [reader] = [c for c in await client.client_list(_type="pubsub") if c["sub"] == "1"]
    before = api._completions._subscriptions
    await client.client_kill_filter(_id=reader["id"])
    [job] = await worker.claim("w", MODELS, 1, 5)
    await worker.complete("w", job, b"ok")
    await wait_until(lambda: truth(api._completions._subscriptions > before))
    enqueued.expected.news.clear()  # lost with the connection, unless the new one was as fast
    [view] = await api.wait(enqueued.ids, 5, expected=enqueued.expected)
    assert view.result == b"ok"
    assert reads[0] == 1


async def test_jobs_that_nobody_awaits_are_not_told_of(make_queue, client):
    api, worker = make_queue(), make_queue()
    subscription = await subscribe(client, api)
    await api.enqueue([new()], awaited=False)
    [job] = await worker.claim("w", MODELS, 1, 5)
    assert not job.awaited
    await worker.complete("w", job, b"ok", attached=b"picture")
    assert await events(subscription, client, api) == []
    await subscription.aclose()


async def test_nothing_is_kept_of_jobs_whose_end_nobody_expects_any_more(queue):
    await queue.enqueue([new()])
    assert len(queue._completions._expected) == 0
