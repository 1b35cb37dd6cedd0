"""Say how far long work is."""

import sys
import time
from collections.abc import Mapping


class Progress:
    """One changing line on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._last = 0.0
        self._started: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, total: int, logs: Mapping[str, float] | None = None) -> None:
        """Report `done` of `total` of a stage, and scalars."""
        now = time.monotonic()
        started, first = self._started.setdefault(stage, (now, done))
        terminal = sys.stderr.isatty()
        if done < total and now - self._last < (0.2 if terminal else 10):
            return
        self._last = now
        if done >= total:
            del self._started[stage]  # it may come again, like the prompts of doctor and training
        left = (now - started) / max(done - first, 1) * (total - done)
        scalars = "".join(f"  {name} {value:.3g}" for name, value in (logs or {}).items())
        line = f"{stage} {done}/{total}  {left:.0f} s left{scalars}"
        if terminal:
            print(f"\r\033[K{line[:160]}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
