"""Hears that jobs have ended: one subscription per process, for any number of waiters.

The event is a hint and the job's hash is the truth. After every (re)connection, and after a long silence,
all waited-for jobs are read again, so a lost event costs time but never a result.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError

from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.outages import OutageLog

log = logging.getLogger(__name__)

QUIET_S = 15.0  # a connection may be dead without either side noticing
MAX_BACKOFF_S = 2.0

ReadEnded = Callable[[Sequence[str]], Awaitable[set[str]]]


class Completions:
    """Turns the pub/sub channel of this process into futures.

    read_ended: given ids, names this process in the live ones and returns those that have ended.
    """

    def __init__(self, client: "Redis", channel: str, read_ended: ReadEnded) -> None:
        self._client = client
        self._channel = channel
        self._read_ended = read_ended
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def wait(self, ids: Iterable[str]) -> None:
        """Return when all jobs have ended or are gone; the caller sets the time limit."""
        futures = {job_id: asyncio.get_running_loop().create_future() for job_id in ids}
        for job_id, future in futures.items():
            self._waiters.setdefault(job_id, set()).add(future)
        try:
            self._start_reader()
            # Only now: a job that ends before the subscription stands is found when it does.
            self._resolve(await self._read_ended(tuple(futures)))
            await asyncio.gather(*futures.values())
        finally:
            for job_id, future in futures.items():
                self._forget(job_id, future)

    async def aclose(self) -> None:
        """Stop the reader."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.wait([reader])

    def _forget(self, job_id: str, future: asyncio.Future[None]) -> None:
        future.cancel()
        waiting = self._waiters[job_id]
        waiting.discard(future)
        if not waiting:
            del self._waiters[job_id]

    def _resolve(self, ids: Iterable[str]) -> None:
        for job_id in ids:
            for future in self._waiters.get(job_id, ()):
                if not future.done():
                    future.set_result(None)

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
                async with self._client.pubsub() as subscription:
                    await subscription.subscribe(self._channel)
                    while True:
                        message = await subscription.get_message(timeout=QUIET_S)
                        if message is not None and message["type"] == "message":
                            self._resolve([message["data"].decode()])
                        elif self._waiters:  # (re)subscribed, or silence
                            self._resolve(await self._read_ended(tuple(self._waiters)))
                        backoff_s = 0.05
                        outage.worked()
            except (RedisError, OSError, QueueUnavailable) as error:
                outage.failed(error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
