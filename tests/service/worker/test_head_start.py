"""Jobs that a worker hears of before the queue tells of them, and pictures that an API hears of before their commit."""

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from flashbulb_service import pipeline, worker
from flashbulb_service.head_start import MAX_PAYLOAD_BYTES, ApiEnd, WorkerEnd, open_pair
from flashbulb_service.jobs import JobState, JobView, NewJob
from flashbulb_service.pipeline import Pipeline
from flashbulb_service.queue import Queue, Taken, completions, new_id
from flashbulb_service.results import ResultStore
from flashbulb_service.tasks import ImageOutcome


def clock() -> float:
    """A clock that stands: nothing is too old on a machine that is busy."""
    return 100.0


@dataclass
class Ends:
    """Both ends of a pair, and what the API was told by it."""

    api: ApiEnd
    worker: WorkerEnd
    raw: tuple[socket.socket, socket.socket]
    answers: list[None] = field(default_factory=list)


@pytest_asyncio.fixture
async def ends(queue: Queue) -> AsyncIterator[Ends]:
    pair = open_pair()
    assert pair is not None
    answers: list[None] = []
    api = ApiEnd(pair[0], queue, lambda: answers.append(None), clock=clock)
    made = Ends(api, WorkerEnd(pair[1], clock=clock), pair, answers)
    loop = asyncio.get_running_loop()
    loop.add_reader(pair[0], made.api.hear)
    yield made
    loop.remove_reader(pair[0])
    for end in pair:
        end.close()


async def ask(queue: Queue, ends: Ends, job: NewJob, running: Any = None) -> JobView:
    """Give a head start for a job, queue it (once a worker has begun, if one is named), and wait for its end."""
    ids = [new_id()]
    ends.api.give(ids, [job])
    while running is not None and running.worker._pipeline._ahead is None:  # noqa: ASYNC110  a thread sets it
        await asyncio.sleep(0)
    expected = (await queue.enqueue([job], ids=ids)).expected
    (view,) = await queue.wait(ids, 20, expected=expected)
    return view


async def idle(running: Any, job: NewJob, wait_until: Any) -> None:
    """Wait until a worker sleeps and knows how long a picture takes: else it has no use for a head start."""
    queue, drawing = running.worker._queue, running.worker._pipeline

    async def sleeps() -> bool:
        is_asleep = any(line.is_busy for line in queue._sleepers) and not drawing._claims
        knows = running.worker._scheduler.lone_ms(job.model, job.bucket) is not None
        return is_asleep and knows and not drawing.is_claiming

    await wait_until(sleeps)


@pytest.fixture
def adopted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each claim that was submitted, whether it went on with what had been begun."""
    found: list[bool] = []
    adopt = Pipeline._adopt

    def watched(*args: Any) -> Any:
        found.append((ahead := adopt(*args)) is not None)
        return ahead

    monkeypatch.setattr(Pipeline, "_adopt", watched)
    return found


@pytest.fixture
def start(
    queue: Queue,
    ends: Ends,
    start_worker: Any,
    picture_job: Any,
    wait_until: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Awaitable[Any]]:
    """Start a worker that knows how long its model takes: a head start is for what is known to be short."""

    monkeypatch.setattr(worker, "EARLY_MS", 1e9)  # the machine may be busy when the time is learnt

    async def started(**settings: Any) -> Any:
        running = start_worker(api=ends.worker, **settings)
        await queue.wait((await queue.enqueue([picture_job("to learn the time")])).ids, 20)
        await idle(running, picture_job(), wait_until)
        return running

    return started


def held(running: Any) -> bool:
    """Whether the queue has told the worker that what it draws is its own."""
    claims = list(running.worker._pipeline._claims.values())
    return bool(claims) and all(claim.is_surely_held for claim in claims)


async def test_a_lone_picture_is_drawn_once_and_told_before_it_is_stored_and_committed(
    queue, start, watched, picture_job, ends, results, wait_until, monkeypatch
):
    running = await start()
    drawing, storing = threading.Event(), threading.Event()
    watched.before = lambda requests: drawing.wait(10)
    write = ResultStore.write
    monkeypatch.setattr(ResultStore, "write", lambda *args: storing.wait(10) and write(*args))
    job = picture_job("red dog", seed=5)
    asking = asyncio.create_task(ask(queue, ends, job, running))

    async def is_held():
        return held(running)

    await wait_until(is_held)
    drawing.set()
    early = await asyncio.wait_for(asking, 10)
    assert early.state is JobState.DONE and ends.answers == [None]
    before = await queue.get(early.id)
    assert before is not None and before.state is JobState.RUNNING
    outcome = ImageOutcome.from_bytes(early.result)
    assert await results.get(outcome.file) is None
    storing.set()
    (stored,) = await queue.wait([early.id], 10)
    assert (stored.state, stored.attempt, stored.result) == (JobState.DONE, 1, early.result)
    assert await results.get(outcome.file) == early.attached
    assert watched.batches == [["to learn the time"], ["red dog"]]
    assert before.enqueued_at == early.enqueued_at <= early.started_at <= early.finished_at


async def test_a_head_start_gives_the_picture_that_the_queue_gives(
    queue, start, adopted, watched, picture_job, ends, results
):
    running = await start()
    files = []
    for told in (True, False):
        job = picture_job("blue boat", seed=11)
        if told:
            view = await ask(queue, ends, job, running)
        else:
            (view,) = await queue.wait((await queue.enqueue([job])).ids, 20)
        await queue.wait([view.id], 20)
        files.append(await results.get(ImageOutcome.from_bytes(view.result).file))
    assert files[0] is not None and files[0] == files[1]
    assert adopted == [False, True, False] and len(watched.batches) == 3


async def test_what_the_queue_never_hands_over_is_not_stored_and_the_model_comes_back(
    queue, start, watched, picture_job, ends, tmp_path: Path, wait_until, monkeypatch
):
    """A request that is refused: nothing of it may be left, and the next one is not drawn in vain."""
    monkeypatch.setattr(pipeline, "ADOPT_S", 0.05)
    running = await start()
    (served,) = running.worker._pool.served.values()
    files = set((tmp_path / "results").iterdir())
    ends.api.give([new_id()], [picture_job("refused")])

    async def is_over():
        return watched.batches[-1] == ["refused"] and served.users == 0

    await wait_until(is_over)
    assert {path for path in (tmp_path / "results").iterdir() if path.suffix == ".png"} <= files
    ends.api.give([new_id()], [picture_job("soon after")])
    view = await ask(queue, ends, picture_job("the next"))
    assert view.state is JobState.DONE
    assert watched.batches[-2:] == [["refused"], ["the next"]] and ends.answers == []


async def test_a_job_gets_its_own_picture_whatever_was_told_of_it(
    queue, start, adopted, picture_job, ends, results, wait_until
):
    running = await start()
    ids, job = [new_id()], picture_job("the job", seed=1)
    ends.api.give(ids, [picture_job("another", seed=2)])

    async def is_begun():
        return running.worker._pipeline._ahead is not None

    await wait_until(is_begun)
    views = await queue.wait((await queue.enqueue([job], ids=ids)).ids, 20)
    views += await queue.wait((await queue.enqueue([job])).ids, 20)
    files = [await results.get(ImageOutcome.from_bytes(view.result).file) for view in views]
    assert files[0] is not None and files[0] == files[1]
    assert ends.answers == [] and adopted == [False, False, False]


async def test_nothing_is_told_early_of_a_job_whose_claim_is_refused(
    queue, start, adopted, picture_job, ends, monkeypatch
):
    running = await start()
    theirs = running.worker._queue
    take, refused = theirs.take, []

    async def refuse_once(*args, **kwargs):
        if kwargs.get("lone") is not None and not refused:
            refused.append(kwargs["lone"])
            return Taken([], more=True)
        return await take(*args, **kwargs)

    monkeypatch.setattr(theirs, "take", refuse_once)
    monkeypatch.setattr(worker, "FRESH_MS", 1e9)
    view = await ask(queue, ends, picture_job("red dog"), running)
    assert refused and adopted[1]
    assert (view.state, view.attempt) == (JobState.DONE, 1)
    assert ends.answers == []


async def test_nothing_is_told_early_before_the_queue_has_said_whose_the_job_is(
    queue, start, adopted, picture_job, ends, tmp_path: Path, wait_until, monkeypatch
):
    running = await start()
    theirs, told = running.worker._queue, asyncio.Event()
    take, files = theirs.take, set((tmp_path / "results").iterdir())

    async def take_late(*args, **kwargs):
        await told.wait()
        return await take(*args, **kwargs)

    monkeypatch.setattr(theirs, "take", take_late)
    monkeypatch.setattr(worker, "FRESH_MS", 1e9)
    asking = asyncio.create_task(ask(queue, ends, picture_job("red dog"), running))

    async def is_drawn():
        return any(path.suffix == ".png" for path in set((tmp_path / "results").iterdir()) - files)

    await wait_until(is_drawn)
    assert not asking.done() and ends.answers == [] and adopted == [False, True]
    told.set()
    view = await asking
    assert (view.state, view.attempt) == (JobState.DONE, 1) and ends.answers == []


async def test_other_work_ends_what_was_begun_ahead(queue, start, watched, picture_job, ends, wait_until):
    running = await start()
    ends.api.give([new_id()], [picture_job("never queued")])

    async def begun():
        return running.worker._pipeline._ahead is not None

    await wait_until(begun)
    (view,) = await queue.wait((await queue.enqueue([picture_job("other")])).ids, 20)
    assert view.state is JobState.DONE and running.worker._pipeline._ahead is None
    (served,) = running.worker._pool.served.values()

    async def is_back():
        return served.users == 0

    await wait_until(is_back)


async def test_no_head_start_is_given_while_somebody_waits_or_for_several(queue, picture_job, ends):
    def heard() -> list[str]:
        return [job.id for job in ends.worker.heard()]

    one, two = picture_job("one"), picture_job("two")
    ends.api.give(["a", "b"], [one, two])
    ends.api.give(["c"], [picture_job(payload=b"x" * (MAX_PAYLOAD_BYTES + 1))])
    assert heard() == []
    ids = (await queue.enqueue([one])).ids
    waiting = asyncio.create_task(queue.wait(ids, 20))
    await asyncio.sleep(0)
    ends.api.give(["d"], [two])
    ends.api.announce()
    with pytest.raises(BlockingIOError):
        ends.raw[1].recv(1)
    await queue.cancel(ids[0])
    await waiting
    ends.api.announce()
    ends.api.give(["e"], [two])
    assert heard() == ["e"]


async def test_what_is_old_or_not_understood_is_passed_over(queue, picture_job, ends):
    api, other = ends.raw
    job = picture_job()
    moments = [clock() - 1, clock() + 60, float("nan")]
    for moment in moments:
        parts = [repr(moment), "old", job.model, job.bucket, job.tenant]
        api.send(b"\0".join([*map(str.encode, parts), job.payload]))
    for nonsense in (b"x", b"\0" * 5, b"", b"100.0\0\xff\0\xff\0\xff\0\xff\0\xff"):
        api.send(nonsense)
        other.send(nonsense)
    ends.api.give(["new"], [job])
    assert [found.id for found in ends.worker.heard()] == ["new"]
    other.send(b"other\x001\x001\x001\0{}\0png")  # of a job that no head start was given for
    other.send(b"new\0nan\x001\x001\0{}\0png")
    ends.api.hear()
    assert ends.answers == []


async def test_nobody_waits_for_a_worker_that_does_not_listen(picture_job, ends):
    for _ in range(2000):
        ends.api.give(["a"], [picture_job(payload=b"x" * 10_000)])


async def test_a_worker_that_may_not_wait_for_its_batch_waits_for_its_thread(
    start, queue, adopted, watched, picture_job, ends, start_worker, wait_until
):
    """The claim goes back at once; the model may be closed when nothing draws with it."""
    running = await start(drain_s=0.0)
    drawing, over = threading.Event(), []

    def draw(requests: Any) -> None:
        drawing.wait(10)
        over.append(True)

    watched.before = draw
    ids, job = [new_id()], picture_job("red dog")
    ends.api.give(ids, [job])

    async def begun():
        return len(watched.batches) == 2

    await wait_until(begun)
    await queue.enqueue([job], ids=ids)

    async def is_adopted():
        return adopted == [False, True]

    await wait_until(is_adopted)
    running.stop.set()
    asyncio.get_running_loop().call_later(0.1, drawing.set)
    assert await running.task is False
    assert over == [True]
    (view,) = await queue.views(ids)
    assert view is not None and view.state is JobState.QUEUED
    await queue.cancel(ids[0])


@pytest.mark.parametrize("size", [0, 100_000])
async def test_a_picture_arrives_with_all_its_bytes(ends, size):
    data = bytes(range(256)) * (size // 256)
    ends.api.give(["a"], [NewJob("tiny@1", "tiny@1:64x64:1", b"{}")])
    (job,) = ends.worker.heard()
    assert ends.worker.answer(job, b"{}", data, started_at=2.0, finished_at=3.0)
    message = ends.raw[0].recv(1 << 20)
    assert message == b"\0".join([b"a", b"0.0", b"2.0", b"3.0", b"{}", data])


async def test_a_job_that_had_a_head_start_counts_from_its_own_acceptance(
    queue, start, adopted, picture_job, ends
):
    """Not from the beginning of time, which the head start gives in its place."""
    running = await start()
    view = await ask(queue, ends, picture_job("red dog"), running)
    await queue.wait([view.id], 20)
    running.worker._pipeline._do_notes()
    exposition = running.worker._metrics.exposition().decode()
    (waited_s,) = re.findall(r"^flashbulb_queue_wait_seconds_sum\{.*\} (\S+)$", exposition, re.MULTILINE)
    assert adopted == [False, True] and float(waited_s) < 60


async def test_what_is_begun_ahead_and_fails_is_tried_again_as_any_other(
    queue, start, adopted, watched, picture_job, ends
):
    running = await start()

    def fail_once(requests: Any) -> None:
        watched.before = lambda requests: None
        raise RuntimeError("no luck")

    watched.before = fail_once
    view = await ask(queue, ends, picture_job("red dog"), running)
    assert (view.state, view.attempt) == (JobState.DONE, 2)
    assert adopted[:2] == [False, True] and ends.answers == []


async def test_what_fails_and_is_never_claimed_gives_its_model_back(
    queue, start, watched, picture_job, ends, wait_until, monkeypatch
):
    monkeypatch.setattr(pipeline, "ADOPT_S", 0.01)
    running = await start()
    (served,) = running.worker._pool.served.values()

    def fail(requests: Any) -> None:
        raise RuntimeError("no luck")

    watched.before = fail
    ends.api.give([new_id()], [picture_job("never queued")])

    async def is_over():
        return len(watched.batches) == 2 and served.users == 0 and running.worker._pipeline._ahead is None

    await wait_until(is_over)


async def test_a_claim_that_comes_too_late_is_drawn_as_any_other(
    queue, start, adopted, watched, picture_job, ends, wait_until, monkeypatch
):
    monkeypatch.setattr(pipeline, "ADOPT_S", 0.01)
    running = await start()
    ids, job = [new_id()], picture_job("red dog")
    ends.api.give(ids, [job])

    async def is_over():
        return len(watched.batches) == 2 and running.worker._pipeline._ahead is None

    await wait_until(is_over)
    (view,) = await queue.wait((await queue.enqueue([job], ids=ids)).ids, 20)
    assert (view.state, view.attempt) == (JobState.DONE, 1)
    assert adopted == [False, False] and watched.batches[1:] == [["red dog"]] * 2


async def test_a_worker_that_stops_waits_for_what_it_began_ahead(
    queue, start, watched, picture_job, ends, wait_until
):
    """Its model is closed next: nothing may draw with it then."""
    running = await start()
    drawing, over = threading.Event(), []

    def draw(requests: Any) -> None:
        drawing.wait(10)
        over.append(True)

    watched.before = draw
    ends.api.give([new_id()], [picture_job("never queued")])

    async def begun():
        return len(watched.batches) == 2

    await wait_until(begun)
    running.stop.set()
    asyncio.get_running_loop().call_later(0.05, drawing.set)
    await running.task
    assert over == [True]


async def test_the_next_request_waits_until_the_queue_knows_what_was_told_early(
    queue, picture_job, monkeypatch
):
    """A client with a single place in the queue would be refused, though it has its answer."""
    monkeypatch.setattr(completions, "SETTLE_S", 60.0)
    ids = (await queue.enqueue([picture_job()])).ids
    waiting = asyncio.create_task(queue.wait(ids, 20))
    (job,) = await queue.claim("w", ["tiny@1"], 8, 5.0)
    stored = await queue.get(job.id)
    queue.tell_early(replace(stored, state=JobState.DONE, result=b"{}"))
    ((view,), settling) = await waiting, asyncio.create_task(queue.settled())
    await asyncio.sleep(0)
    assert view.result == b"{}" and not settling.done()
    assert await queue.complete("w", job, b"{}")
    await asyncio.wait_for(settling, 20)
    monkeypatch.setattr(completions, "SETTLE_S", 0.01)
    kept = queue._completions.expect(["refused"])
    assert queue.tell_early(replace(view, id="refused"))
    await asyncio.wait_for(queue.settled(), 20)  # the queue never tells of it
    assert kept.news


async def test_an_early_result_that_nobody_wants_holds_up_nobody(queue, picture_job, monkeypatch):
    """Its client has left, or the queue was faster: no news of a commit will come."""
    monkeypatch.setattr(completions, "SETTLE_S", 60.0)
    enqueued = await queue.enqueue([picture_job()])
    stored = await queue.get(enqueued.ids[0])
    early = replace(stored, state=JobState.DONE, result=b"{}")
    waiting = asyncio.create_task(queue.wait(enqueued.ids, 20, expected=enqueued.expected))
    await queue.cancel(stored.id)
    await waiting
    enqueued.expected.news[stored.id] = early  # as if the queue's word had come first
    assert not queue.tell_early(early)
    del enqueued, waiting
    assert not queue.tell_early(early)
    await asyncio.wait_for(queue.settled(), 20)


async def test_an_early_result_that_comes_before_anybody_waits_is_kept(queue, picture_job):
    """Though the news of this process do not stand yet: nothing of the queue's would have been missed."""
    enqueued = await queue.enqueue([picture_job()])
    stored = await queue.get(enqueued.ids[0])
    queue.tell_early(replace(stored, state=JobState.DONE, result=b"{}"))
    (view,) = await queue.wait(enqueued.ids, 20, expected=enqueued.expected)
    assert view.result == b"{}"
    await queue.cancel(view.id)
