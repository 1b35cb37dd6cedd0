"""What a process keeps in memory, moved to pages of 2 MiB (Linux from 6.1 on; elsewhere nothing is done).

At light load the processor has forgotten where the pages of weights and objects are, and looks each of them up in four
tables, in a virtual machine in both machines' tables. A huge page is one look for 512 small ones.
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PAGE, HUGE_PAGE = 4 << 10, 2 << 20
PAGES = HUGE_PAGE // PAGE
FULL = PAGES * 3 // 4  # small pages in use, from which on a huge page takes hardly more memory
MADV_COLLAPSE = 25


def use_huge_pages() -> int:
    """Move what is in memory now to huge pages, where that takes hardly more of it; call it when all is loaded.

    Returns:
        How many bytes now lie on huge pages; 0 where the system does not offer that.
    """
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    resident = ctypes.create_string_buffer(PAGES)
    moved = 0
    for begin, end in private_regions(Path("/proc/self/maps").read_text().splitlines()):
        for block in huge_blocks(begin, end):
            if libc.mincore(block, HUGE_PAGE, resident) or sum(map(_is_in_use, resident.raw)) < FULL:
                continue
            if libc.madvise(block, HUGE_PAGE, MADV_COLLAPSE) == 0:
                moved += HUGE_PAGE
    return moved


def private_regions(maps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the regions of /proc/PID/maps that may be written and belong to no file."""
    for line in maps:
        addresses, access, _, _, inode, *name = line.split(maxsplit=5)
        if (access == "rw-p" and inode == "0" and not name) or name == ["[heap]"]:
            begin, end = addresses.split("-")
            yield int(begin, 16), int(end, 16)


def huge_blocks(begin: int, end: int) -> range:
    """Return where the huge pages begin that lie in a region as a whole."""
    return range(-(-begin // HUGE_PAGE) * HUGE_PAGE, end - HUGE_PAGE + 1, HUGE_PAGE)


def _is_in_use(flags: int) -> int:
    return flags & 1
