"""Hears that jobs have ended: one subscription per process, for any number of waiters.

An event tells all of a job, but it may be lost: the job's hash is the truth. After every (re)connection, and after
a long silence, all waited-for jobs are read again, so a lost event costs time but never a result. A connection that
does not answer then is made anew.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from weakref import WeakValueDictionary

from redis.asyncio import Redis
from redis.exceptions import RedisError

from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.jobs import JobView
from flashbulb_service.outages import OutageLog
from flashbulb_service.queue.line import Line
from flashbulb_service.queue.views import read_news

log = logging.getLogger(__name__)

QUIET_S = 15.0  # a connection may be dead without either side noticing
ANSWER_S = 5.0  # then it is closed
MAX_BACKOFF_S = 2.0
SETTLE_S = 0.05  # a commit takes 1 ms

ReadEnded = Callable[[Sequence[str]], Awaitable[set[str]]]


class Expected:
    """Jobs that are about to be stored by this process; collects the news of their end until it is dropped."""

    def __init__(self, subscription: int) -> None:
        """Remember which subscription stood before the jobs were stored; 0: none."""
        self.subscription = subscription
        self.news: dict[str, JobView] = {}


class Completions:
    """Turns the pub/sub channel of this process into futures.

    read_ended: given ids, names this process in the live ones and returns those that have ended.
    """

    def __init__(self, client: "Redis", channel: str, read_ended: ReadEnded) -> None:
        self._line = Line(client, timeout_s=ANSWER_S, hear=self._hear, lost=self._unsubscribed)
        self._channel = channel
        self._read_ended = read_ended
        self._waiters: dict[str, set[asyncio.Future[JobView | None]]] = {}
        self._expected: WeakValueDictionary[str, Expected] = WeakValueDictionary()
        self._told: str | None = None  # the job that was told early last, until the queue tells of it
        self._settled = asyncio.Event()
        self._subscriptions = 0  # that were made so far
        self._stands = False
        self._again = asyncio.Event()  # an event was lost, or may have been
        self._reader: asyncio.Task[None] | None = None

    def expect(self, ids: Iterable[str]) -> Expected:
        """Listen for jobs that are about to be stored, for as long as the caller keeps what is returned."""
        expected = Expected(self._subscriptions if self._stands else 0)
        self._expected.update(dict.fromkeys(ids, expected))
        return expected

    async def wait(self, ids: Iterable[str], expected: Expected | None = None) -> dict[str, JobView]:
        """Return when all jobs have ended or are gone; the caller sets the time limit.

        Returns:
            id -> the job as it ended, of those whose event came; the others are to be read.
        """
        futures = {job_id: asyncio.get_running_loop().create_future() for job_id in ids}
        for job_id, future in futures.items():
            self._waiters.setdefault(job_id, set()).add(future)
        try:
            self._start_reader()
            for view in tuple(expected.news.values()) if expected is not None else ():
                self._resolve(view.id, view)
            if expected is None or not self._stands or expected.subscription != self._subscriptions:
                # Only now: a job that ends before the subscription stands is found when it does.
                await self._look([job_id for job_id, future in futures.items() if not future.done()])
            for future in futures.values():
                await future
            return {job_id: view for job_id, future in futures.items() if (view := future.result())}
        finally:
            for job_id, future in futures.items():
                self._forget(job_id, future)

    @property
    def is_awaited(self) -> bool:
        """Tell whether anybody waits."""
        return bool(self._waiters)

    def tell(self, view: JobView) -> None:
        """Give those who wait for a job its view, and those who are about to."""
        if (expected := self._expected.get(view.id)) is not None:
            expected.news[view.id] = view
        self._resolve(view.id, view)

    def tell_early(self, view: JobView) -> bool:
        """Do as `tell` for a job whose end the queue is about to tell; return False where nobody wants to hear it."""
        is_waited_for = any(not future.done() for future in self._waiters.get(view.id, ()))
        expected = self._expected.get(view.id)
        if not is_waited_for and (expected is None or view.id in expected.news):
            return False
        self._told, self._settled = view.id, asyncio.Event()
        self.tell(view)
        return True

    async def settled(self) -> None:
        """Return when the end of the job that was told early last has been heard, or after `SETTLE_S`."""
        if (told := self._told) is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                await self._settled.wait()
        if self._told == told:  # it may have been refused: nothing will be heard of it
            self._told = None

    async def aclose(self) -> None:
        """Stop the reader."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.wait([reader])
        await self._line.aclose()

    def _forget(self, job_id: str, future: asyncio.Future[JobView | None]) -> None:
        future.cancel()
        waiting = self._waiters[job_id]
        waiting.discard(future)
        if not waiting:
            del self._waiters[job_id]

    async def _look(self, ids: Iterable[str]) -> None:
        """Read whether jobs have ended."""
        if not (unknown := tuple(ids)):
            return
        for job_id in await self._read_ended(unknown):
            self._resolve(job_id, None)

    def _resolve(self, job_id: str, view: JobView | None) -> None:
        for future in self._waiters.get(job_id, ()):
            if not future.done():
                future.set_result(view)

    def _hear(self, message: bytes) -> None:
        try:
            view = read_news(message)
        except ValueError as error:  # of another release, perhaps: it says at least that something happened
            log.warning("event of an ended job not understood: %s", error)
            self._again.set()
            return
        if view.id == self._told:
            self._told = None
            self._settled.set()
        self.tell(view)

    def _unsubscribed(self) -> None:
        self._stands = False
        self._again.set()

    def _start_reader(self) -> None:
        if self._reader is None:
            self._reader = asyncio.create_task(self._read_for_ever(), name="queue-completions")
            self._reader.add_done_callback(self._reader_ended)

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        """Pass a bug of the reader on to the waiters instead of leaving them in the dark."""
        self._reader = None
        error = None if reader.cancelled() else reader.exception()
        for waiting in self._waiters.values():
            for future in waiting:
                if future.done():
                    continue
                if error is None:
                    future.cancel()
                else:
                    future.set_exception(error)

    async def _read_for_ever(self) -> None:
        backoff_s = 0.05
        outage = OutageLog(log, "completion events interrupted")
        while True:
            try:
                self._again.clear()
                stood = self._stands
                if not stood:
                    await self._line.call("SUBSCRIBE", self._channel)
                    self._subscriptions += 1
                    self._stands = True
                if self._waiters:  # an event may have been lost before this, or by a dead connection
                    await self._look(self._waiters)
                if stood:  # it only listens: what is not asked for an answer seems well when it is dead
                    await self._line.call("PING")
                backoff_s = 0.05
                outage.worked()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(QUIET_S):
                        await self._again.wait()
            except (RedisError, QueueUnavailable) as error:
                outage.failed(error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
