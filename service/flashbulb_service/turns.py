"""Whose turn it is on a device: a batch of short work, or the next step of long work.

Long work gives its turn back after every step. Short work goes first, but for the share that long work keeps while both
wait; and long work never has two turns in a row while short work waits. So a picture is kept by at most one step of a
video, and a video gets at least its share of a saturated device.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from flashbulb_service.scheduler import LONG, LONG_SHARE, SHORT

HALF_LIFE_MS = 60_000.0
EXPECT_S = 0.05  # a claim takes 1 to 5 ms; another worker may have been faster


@dataclass(frozen=True, slots=True)
class Shares:
    """Recent device time of each lane, which fades, and who had the last turn."""

    short_ms: float = 0.0
    long_ms: float = 0.0
    at_ms: float = 0.0
    last: str | None = None

    def charged(self, lane: str, ms: float, now_ms: float) -> "Shares":
        """Return the shares after a turn of a lane that took ms and ended now."""
        fade = 0.5 ** (max(0.0, now_ms - self.at_ms) / HALF_LIFE_MS)
        short, long = self.short_ms * fade, self.long_ms * fade
        short, long = (short, long + ms) if lane == LONG else (short + ms, long)
        return Shares(short, long, now_ms, lane)

    def levelled(self, long_share: float = LONG_SHARE) -> "Shares":
        """Return the shares when long work begins: it has no claim on the time before it came."""
        return replace(self, long_ms=max(self.long_ms, self.short_ms * long_share / (1 - long_share)))


def next_lane(waiting: Collection[str], shares: Shares, long_share: float = LONG_SHARE) -> str | None:
    """Choose whose turn it is among the lanes that wait; None when none does."""
    if len(waiting) < 2:
        return next(iter(waiting), None)
    is_owed = shares.long_ms / long_share < shares.short_ms / (1 - long_share)
    return LONG if is_owed and shares.last != LONG else SHORT


class Turn:
    """One batch's place on the device: a context that holds the device, and can give way inside."""

    def __init__(self, turns: "Turns", lane: str) -> None:
        """Take no place yet: `Turns.enter` does."""
        self.lane = lane
        self.held_ms = 0.0  # so far, without the time in which it gave way
        self.is_ready = False  # waits for the device, and not for something before it
        self._turns = turns

    def __enter__(self) -> Self:
        """Wait for the device."""
        self._turns.acquire(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave it to the others, for good."""
        self._turns.release(self, is_over=True)

    @contextmanager
    def given_way(self, *, was_idle: bool = False) -> Iterator[None]:
        """Leave the device to others while this is open, then wait for it again. was_idle: nothing ran in this turn."""
        self._turns.release(self, was_idle=was_idle)
        try:
            yield
        finally:
            self._turns.acquire(self)


class Turns:
    """The device of one worker, used by one batch at a time. Use it from threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with an idle device."""
        self._clock = clock
        self._changed = threading.Condition()
        self._places: list[Turn] = []
        self._running: Turn | None = None
        self._since = 0.0
        self._shares = Shares()
        self._expected_until = 0.0  # short work is on its way to us
        self.num_turns = 0  # so far

    @contextmanager
    def enter(self, lane: str) -> Iterator[Turn]:
        """Take a place; from then on long work lets short work go first, even before that is ready to run."""
        turn = Turn(self, lane)
        with self._changed:
            if lane == SHORT:
                self._expected_until = 0.0
            elif all(place.lane == SHORT for place in self._places):
                self._shares = self._shares.levelled()
            self._places.append(turn)
            self._changed.notify_all()
        try:
            yield turn
        finally:
            with self._changed:
                if turn in self._places:
                    self._places.remove(turn)
                self._changed.notify_all()

    def expect_short(self, within_s: float = EXPECT_S) -> None:
        """Have long work wait a moment for short work that was seen in the queue."""
        with self._changed:
            if all(place.lane == LONG for place in self._places):
                self._expected_until = self._clock() + within_s

    @property
    def is_long_owed(self) -> bool:
        """Tell whether long work would go before short work now."""
        with self._changed:
            return next_lane((SHORT, LONG), self._shares) == LONG

    def acquire(self, turn: Turn) -> None:
        """Wait until it is this one's turn."""
        with self._changed:
            turn.is_ready = True
            while self._running is not None or self._next() is not turn:
                left_s = self._expected_until - self._clock()
                self._changed.wait(left_s if left_s > 0 else None)
            turn.is_ready = False
            self._running, self._since = turn, self._clock()
            self.num_turns += 1

    def release(self, turn: Turn, *, is_over: bool = False, was_idle: bool = False) -> None:
        """End a turn; the place stays, unless it is over. A turn in which nothing ran is nobody's."""
        with self._changed:
            now = self._clock()
            if not was_idle:
                ms = (now - self._since) * 1000
                turn.held_ms += ms
                self._shares = self._shares.charged(turn.lane, ms, now * 1000)
            self._running = None
            if is_over:
                self._places.remove(turn)
            self._changed.notify_all()

    def _next(self) -> Turn | None:
        ready = [place for place in self._places if place.is_ready]
        waiting = {place.lane for place in self._places if place.is_ready or place.lane == SHORT}
        if self._clock() < self._expected_until:
            waiting.add(SHORT)
        lane = next_lane(waiting, self._shares)
        return next((place for place in ready if place.lane == lane), None)
