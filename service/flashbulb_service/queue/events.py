"""Hears what happens to watched requests: one blocking reader per process, for any number of watchers.

A stream entry's id is its place: a watcher that names the last one it saw goes on from there.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.queue.connection import CONNECT_TIMEOUT_S, unavailable
from flashbulb_service.queue.keys import Keys

log = logging.getLogger(__name__)

BLOCK_MS = 15_000
CONTROL_TTL_S = 60
MAX_PENDING = 1_000  # more than a stream holds
BACKOFF_S = 0.2


@dataclass(frozen=True, slots=True)
class Event:
    """One entry: kind is a state's name, "retry" or "progress"; row says which job of the request."""

    id: str
    kind: str
    row: int
    at: float  # seconds since the epoch, server's clock
    data: Mapping[str, str]


@dataclass(eq=False)
class _Watcher:
    request_id: str
    after: str
    owner: str
    pending: asyncio.Queue[Event] = field(default_factory=lambda: asyncio.Queue(MAX_PENDING))


def place(event_id: str) -> tuple[int, int]:
    """Turn a stream id into numbers that compare as the entries follow each other."""
    head, _, tail = event_id.partition("-")
    return int(head), int(tail or 0)


class Events:
    """The watched streams of this process."""

    def __init__(self, client: "Redis", keys: Keys, instance: str) -> None:
        self._client = client
        self._keys = keys
        self._control = keys.events_control(instance)
        self._watchers: set[_Watcher] = set()
        self._reader: asyncio.Task[None] | None = None

    @property
    def watched(self) -> int:
        """Return how many watchers there are."""
        return len(self._watchers)

    def watched_by(self, owner: str) -> int:
        """Return how many watchers an owner has."""
        return sum(watcher.owner == owner for watcher in self._watchers)

    async def watch(
        self, request_id: str, *, after: str, quiet_s: float, owner: str = ""
    ) -> AsyncGenerator[Event | None, None]:
        """Yield the events behind `after`, old ones first, for ever; None after every `quiet_s` without one."""
        watcher = _Watcher(request_id, after, owner)
        self._watchers.add(watcher)
        try:
            self._start_reader()
            await self._wake()
            while True:
                try:
                    async with asyncio.timeout(quiet_s):
                        event = await watcher.pending.get()
                except TimeoutError:
                    yield None
                else:
                    yield event
        finally:
            self._watchers.discard(watcher)

    async def past(self, request_id: str, *, after: str) -> list[Event]:
        """Return the events behind `after` that have been written already."""
        low = "-" if after == "0" else f"({after}"
        entries: Any = await self._client.xrange(self._keys.events(request_id), min=low)
        return [_event(entry_id, fields) for entry_id, fields in entries]

    async def aclose(self) -> None:
        """Stop the reader."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.wait([reader])

    async def _wake(self) -> None:
        """End the reader's blocking call, so that it starts again with the new stream."""
        try:
            # A connection that died without a word would keep its watcher from what the reader hands out.
            async with unavailable(CONNECT_TIMEOUT_S), self._client.pipeline(transaction=False) as pipe:
                pipe.xadd(self._control, {"": ""}, maxlen=1, approximate=False)
                pipe.expire(self._control, CONTROL_TTL_S)
                await pipe.execute()
        except (RedisError, QueueUnavailable, OSError) as error:
            log.warning("event reader not woken, it looks again by itself: %s", error)

    def _start_reader(self) -> None:
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_for_ever(), name="queue-events")

    async def _read_for_ever(self) -> None:
        seen = "0"  # of the control stream
        while True:
            try:
                places: dict[str, str] = {}
                for watcher in self._watchers:
                    key = self._keys.events(watcher.request_id)
                    if key not in places or place(watcher.after) < place(places[key]):
                        places[key] = watcher.after
                streams: Any = {self._control: seen, **places}
                # The margin ends a wait on a connection that died without a word.
                async with unavailable(BLOCK_MS / 1000 + CONNECT_TIMEOUT_S):
                    answer: Any = await self._client.xread(streams, block=BLOCK_MS, count=200)
                for name, entries in answer or ():
                    if name.decode() == self._control:
                        seen = entries[-1][0].decode()
                    else:
                        self._hand_out(name.decode(), entries)
            except (RedisError, QueueUnavailable, OSError) as error:
                log.warning("events interrupted, trying again: %s", error)
                await asyncio.sleep(BACKOFF_S)

    def _hand_out(self, key: str, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        events = [_event(entry_id, fields) for entry_id, fields in entries]
        for watcher in list(self._watchers):
            if self._keys.events(watcher.request_id) != key:
                continue
            for event in events:
                if place(event.id) > place(watcher.after) and not watcher.pending.full():
                    watcher.after = event.id
                    watcher.pending.put_nowait(event)


def _event(entry_id: bytes, fields: dict[bytes, bytes]) -> Event:
    texts = {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
    return Event(
        id=entry_id.decode(),
        kind=texts.pop("kind"),
        row=int(texts.pop("row")),
        at=int(texts.pop("at")) / 1000,
        data=texts,
    )
