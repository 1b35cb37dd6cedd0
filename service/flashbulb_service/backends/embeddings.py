"""Embeddings of prompts that were seen before: exact, least recently used out first, bounded by bytes."""

import mmap
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
            self._rows[key] = _off_heap(row)
            self.bytes += size
            while self.bytes > self._capacity:
                (sha256, text), oldest = self._rows.popitem(last=False)
                self.bytes -= _bytes(sha256, text, oldest)


def _off_heap(row: Row) -> Row:
    """Copy a row to pages of its own.

    Rows stay; on the C heap they would come to lie between the arrays of batches, which come and go and differ in size,
    and less and less of what those leave could be used again.
    """
    pages = mmap.mmap(-1, _page_bytes(row), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tokens, pooled = row
    kept = (
        np.frombuffer(pages, tokens.dtype, tokens.size).reshape(tokens.shape),
        np.frombuffer(pages, pooled.dtype, pooled.size, offset=tokens.nbytes).reshape(pooled.shape),
    )
    for copy, values in zip(kept, row, strict=True):
        copy[...] = values
    return kept


def _page_bytes(row: Row) -> int:
    """Return the bytes of the whole pages that hold a row."""
    return -(-sum(values.nbytes for values in row) // mmap.PAGESIZE) * mmap.PAGESIZE or mmap.PAGESIZE


def _bytes(sha256: str, prompt: str, row: Row) -> int:
    return len(sha256) + 4 * len(prompt) + _page_bytes(row) + 512  # of the entry itself
