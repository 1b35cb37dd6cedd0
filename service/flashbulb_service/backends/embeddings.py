"""Embeddings of prompts that were seen before: exact, least recently used out first, bounded by bytes."""

import threading
from collections import OrderedDict

import numpy as np

CAPACITY_BYTES = 64 << 20

Row = tuple[np.ndarray, np.ndarray]


class EmbeddingCache:
    """Rows of (tokens, pooled) by (bundle sha256, prompt). Safe to use from several threads."""

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES) -> None:
        """Start empty; a capacity of 0 keeps nothing."""
        self._capacity = capacity_bytes
        self._rows: OrderedDict[tuple[str, str], Row] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, bundle_sha256: str, prompt: str) -> Row | None:
        """Return the row of a prompt, and count a hit or a miss."""
        with self._lock:
            row = self._rows.get((bundle_sha256, prompt))
            if row is None:
                self.misses += 1
            else:
                self.hits += 1
                self._rows.move_to_end((bundle_sha256, prompt))
            return row

    def put(self, bundle_sha256: str, prompt: str, row: Row) -> None:
        """Keep a copy of a row (a view would keep its whole batch alive); the least recently used ones make room."""
        key, size = (bundle_sha256, prompt), _bytes(bundle_sha256, prompt, row)
        with self._lock:
            if size > self._capacity or key in self._rows:
                return
            self._rows[key] = (row[0].copy(), row[1].copy())
            self.bytes += size
            while self.bytes > self._capacity:
                (sha256, text), oldest = self._rows.popitem(last=False)
                self.bytes -= _bytes(sha256, text, oldest)


def _bytes(sha256: str, prompt: str, row: Row) -> int:
    return len(sha256) + 4 * len(prompt) + row[0].nbytes + row[1].nbytes + 512  # of the entry itself
