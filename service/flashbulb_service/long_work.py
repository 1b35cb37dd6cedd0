"""What long work does between two steps: give the device away, tell how far it is, hear whether it is wanted."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from flashbulb_service.turns import Turn, Turns

ANSWER_S = 1.0  # longest wait for the queue; without its answer the next step is drawn
MAX_KNOWN = 1024

Key = tuple[str, str, int]  # model, bucket, rows


@dataclass
class LongRun:
    """One run of a batch of long work, used on the thread that draws it.

    device, turn: where it runs; it holds the turn whenever a method is called.
    known_s: seconds of a step, newest; shared by all runs.
    tell: (steps done, steps) -> whether short work waits in the queue. ask: the same, and tells nobody.
    tell_last: called on the loop with the number of steps when all are done.
    note: called on the loop with the time at which a step that began should end (inf: unknown), 0.0 when it has ended.
    """

    device: Turns
    turn: Turn
    loop: asyncio.AbstractEventLoop
    key: Key
    known_s: MutableMapping[Key, float]
    tell: Callable[[int, int], Coroutine[Any, Any, bool]]
    ask: Callable[[], Coroutine[Any, Any, bool]]
    tell_last: Callable[[int], None]
    note: Callable[[float], None]
    _began: float = field(default=0.0, init=False)

    def begin_step(self) -> None:
        """Say when the step that begins should end."""
        self._began = time.monotonic()
        self.loop.call_soon_threadsafe(self.note, self._began + self.known_s.get(self.key, math.inf))

    def end_step(self, step: int, num_steps: int) -> None:
        """Learn from a step (from 0) that ended; before another one, let short work go first."""
        if len(self.known_s) >= MAX_KNOWN:
            self.known_s.clear()
        self.known_s[self.key] = time.monotonic() - self._began
        self.loop.call_soon_threadsafe(self.note, 0.0)
        if step + 1 == num_steps:
            self.loop.call_soon_threadsafe(self.tell_last, num_steps)
            return
        before = self.device.num_turns
        with self.turn.given_way():
            self._listen(self.tell(step + 1, num_steps))
        # Behind the short work that ran meanwhile more may have come.
        while (
            self.device.num_turns > before + 1 and self._listen(self.ask()) and not self.device.is_long_owed
        ):
            before = self.device.num_turns
            with self.turn.given_way(was_idle=True):
                pass

    def _listen(self, question: Coroutine[Any, Any, bool]) -> bool:
        """Return whether short work waits in the queue; it is then expected on the device."""
        asking = asyncio.run_coroutine_threadsafe(question, self.loop)
        try:
            waits = asking.result(ANSWER_S)
        except TimeoutError:
            return False  # what it tells is still told, before all that is told later
        if waits:
            self.device.expect_short()
        return waits
