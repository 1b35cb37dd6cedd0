"""Waits that end when their process is to stop, without a task and a turn of the event loop for each."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Self, TypeVar

Result = TypeVar("Result")


class Stoppable:
    """Awaits one thing after another, none of them beyond the moment in which an event is set."""

    def __init__(self, stop: asyncio.Event) -> None:
        """Be told by an event; see `by`."""
        self._stop = stop
        self._wait: asyncio.Timeout | None = None

    @classmethod
    @asynccontextmanager
    async def by(cls, stop: asyncio.Event) -> AsyncIterator[Self]:
        """Listen to an event while this is open."""
        made = cls(stop)
        listening = asyncio.create_task(made._listen())
        try:
            yield made
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def __call__(self, work: Awaitable[Result]) -> Result | None:
        """Await `work`, but no longer than until the event is set (then None); raise what the work raised."""
        wait = asyncio.timeout(0.0 if self._stop.is_set() else None)
        try:
            async with wait:
                self._wait = wait
                return await work
        except TimeoutError:
            if not wait.expired():
                raise
            return None
        finally:
            self._wait = None

    async def _listen(self) -> None:
        await self._stop.wait()
        if self._wait is not None:
            self._wait.reschedule(0.0)  # a time long ago: now
