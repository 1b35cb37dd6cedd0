"""What a process keeps in memory, moved to pages of 2 MiB (Linux from 6.1 on; elsewhere nothing is done).

At light load the processor has forgotten where the pages of weights and objects are, and looks each of them up in four
tables, in a virtual machine in both machines' tables. A huge page is one look for 512 small ones.
"""

import ctypes
import logging
import mmap
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PAGE, HUGE_PAGE = 4 << 10, 2 << 20
PAGES = HUGE_PAGE // PAGE
FULL = PAGES * 15 // 16  # small pages in use, from which on a huge page takes hardly more memory
# A page takes some 4 ms to move. Who has more than this draws for seconds, and would not notice what is won.
MAX_BYTES = 1 << 30
MADV_COLLAPSE = 25
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")

log = logging.getLogger(__name__)


def use_huge_pages() -> int:
    """Move what is in memory now to huge pages, where that takes hardly more of it; call it when all is loaded.

    Returns:
        How many bytes now lie on huge pages; 0 where the system does not offer that or an administrator forbids it.
    """
    if sys.platform != "linux" or mmap.PAGESIZE != PAGE:
        return 0
    try:
        if "[never]" in SWITCH.read_text():  # the call itself would not heed it
            return 0
        maps = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    moved = _collapse(maps)
    log.info("%d MB lie on huge pages", moved >> 20)
    return moved


def _collapse(maps: Iterable[str]) -> int:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    resident = ctypes.create_string_buffer(PAGES)
    moved = 0
    for begin, end in private_regions(maps):
        for block in huge_blocks(begin, end):
            if moved >= MAX_BYTES:
                return moved
            if libc.mincore(block, HUGE_PAGE, resident) or resident.raw.count(1) < FULL:
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
