"""The C library's heap, kept from growing in a process that lives for weeks (glibc; elsewhere nothing is done)."""

import ctypes
import sys

# Parameters of mallopt(3).
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
# glibc opens eight heaps for every core, and threads leave holes in each: a worker grew by a third before it was level.
HEAPS = 2
# Its own limits rise with the largest block that was ever freed, after which less and less is given back. Lower ones
# than these make it take and give back memory within every picture, and each new page is a fault: 280 for one picture.
MMAP_BYTES, TRIM_BYTES = 32 << 20, 64 << 20


def bound_heap() -> bool:
    """Have few heaps, which give back what is free; call it before threads start. Tell whether that was done."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((ARENA_MAX, HEAPS), (MMAP_THRESHOLD, MMAP_BYTES), (TRIM_THRESHOLD, TRIM_BYTES))
    return bool(sum(mallopt(name, value) for name, value in wanted) == len(wanted))  # 1 each
