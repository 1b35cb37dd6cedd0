"""Pairs that another process is still making: training begins with the first shards and takes in more as they come.

How many pairs a step draws from is written down before the step, and read again when a run is resumed or goes back:
so a step draws the same pairs whenever it is computed.

    <stage>/pairs.jsonl     {"step": 0, "pairs": 640}, a line for each look at the store
"""

from pathlib import Path

from torch import Tensor

from ..ranks import ALONE, Ranks
from .lines import add_lines, drop_torn_line, read_lines
from .store import count_pairs, read_pairs

JOURNAL = "pairs.jsonl"
EVERY = 20  # steps from look to look


class GrowingPairs:
    """A store's pairs as far as they are known; `Pairs` says what is what.

    Args:
        folder: of the store.   total: how many pairs it will hold in the end.
        journal: the file that says what was known at which step.
        ranks: who must all draw from the same pairs; the first one looks and writes.
    """

    def __init__(
        self, folder: Path, journal: Path, total: int, *, ranks: Ranks = ALONE, every: int = EVERY
    ) -> None:
        self._folder, self._journal, self._ranks = folder, journal, ranks
        self._total, self._every = total, every
        self._looks: list[tuple[int, int]] = ranks.first(self._recall) or [self._look(0)]
        self._pairs = read_pairs(folder, self._looks[-1][1])

    @property
    def x_T(self) -> Tensor:
        """Noise [n, ...] of the pairs that were seen so far."""
        return self._pairs.x_T

    @property
    def x_0(self) -> Tensor:
        """Clean latents [n, ...] of the pairs that were seen so far."""
        return self._pairs.x_0

    @property
    def prompt(self) -> Tensor:
        """Each pair's row among the prompts, int64 [n]."""
        return self._pairs.prompt

    def known(self, step: int) -> int:
        """Return how many pairs a step draws from, and look for new ones where that is due.

        All ranks must ask at the same points. A step that was computed before finds what it found then.
        """
        last, seen = self._looks[-1]
        if seen < self._total and step >= last + self._every:
            self._looks.append(self._look(step))
            if self._looks[-1][1] > seen:
                self._pairs = read_pairs(self._folder, self._looks[-1][1], after=self._pairs)
        return next(pairs for at, pairs in reversed(self._looks) if at <= step)

    def _recall(self) -> list[tuple[int, int]]:
        drop_torn_line(self._journal)
        return [(line["step"], line["pairs"]) for line in read_lines(self._journal)]

    def _look(self, step: int) -> tuple[int, int]:
        """Count the store's pairs and write that down; all ranks get the first one's count."""

        def look() -> tuple[int, int]:
            pairs = count_pairs(self._folder)
            add_lines(self._journal, [{"step": step, "pairs": pairs}])
            return step, pairs

        return self._ranks.first(look)
