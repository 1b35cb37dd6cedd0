"""Outages: when to try again, and a log of their begin, of now and then, and of their end; not of every attempt."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

REPEAT_S = 30.0
BACKOFF_S = 0.5  # between two tries
RESTART_S = 1.0  # after what nobody foresaw


async def keep_at(work: Callable[[], Awaitable[None]]) -> None:
    """Do a work that shall last as long as the process; what ends it early is logged, and it begins again."""
    while True:
        try:
            return await work()
        except Exception:  # nobody looks at the task before the process ends
            log.exception("unforeseen error in the upkeep, which begins again")
        await asyncio.sleep(RESTART_S)


class OutageLog:
    """The log of one thing that is tried again and again."""

    def __init__(
        self,
        log: logging.Logger,
        what: str,
        *,
        repeat_s: float = REPEAT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Say `what` fails, as it shall stand in the log."""
        self._log = log
        self._what = what
        self._repeat_s = repeat_s
        self._clock = clock
        self._began: float | None = None
        self._told = 0.0
        self._untold = 0

    def failed(self, error: Exception) -> None:
        """Note a failed attempt; the first is logged, and then one every `repeat_s`."""
        now = self._clock()
        if self._began is None:
            self._began = now
        elif now - self._told < self._repeat_s:
            self._untold += 1
            return
        more = f" ({self._untold} more like this)" if self._untold else ""
        self._log.warning("%s: %s%s", self._what, error, more)
        self._told = now
        self._untold = 0

    def worked(self) -> None:
        """Note an attempt that succeeded; the end of an outage is logged."""
        if self._began is None:
            return
        self._log.info("%s no longer: it lasted %.1f s", self._what, self._clock() - self._began)
        self._began = None
        self._untold = 0
