"""What is in memory moves to huge pages, and what is not there is not brought in; told by the kernel itself."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from flashbulb_service.huge_pages import (
    HUGE_PAGE,
    MADV_COLLAPSE,
    PAGE,
    PAGES,
    SWITCH,
    huge_blocks,
    private_regions,
)

BLOCKS = 40
SPARE_KIB = 4 * HUGE_PAGE // 1024  # of the interpreter's own, whose last pages were not in use
NO_BRACKETS = str.maketrans("", "", "[]")
OFFERED = "always [madvise] never\n"

MOVE = """
import mmap, sys
from pathlib import Path
from flashbulb_service import huge_pages
from flashbulb_service.huge_pages import HUGE_PAGE, PAGE, PAGES

def told():
    lines = [line.split() for line in open("/proc/self/smaps_rollup")]
    kib = {line[0]: int(line[1]) for line in lines if line[-1] == "kB"}
    return kib["Rss:"], kib["AnonHugePages:"]

blocks, pages, huge_pages.SWITCH = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
region = mmap.mmap(-1, (blocks + 1) * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
region.madvise(mmap.MADV_NOHUGEPAGE)
for place in range(0, len(region), PAGE):
    if place // PAGE % PAGES < pages:
        region[place] = 1
region.madvise(mmap.MADV_HUGEPAGE)
memory, huge = told()
moved = huge_pages.use_huge_pages()
print(moved, *(now - before for now, before in zip(told(), (memory, huge))))
"""


def can_move() -> bool:
    """Ask the kernel itself: it needs to be of 6.1 or later, and to know huge pages."""
    if mmap.PAGESIZE != PAGE:
        return False
    probe = mmap.mmap(-1, 2 * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    probe[::PAGE] = bytes(2 * PAGES)
    try:
        probe.madvise(MADV_COLLAPSE)
    except OSError:
        return False
    return True


needs_huge_pages = pytest.mark.skipif(not can_move(), reason="this kernel cannot move memory to huge pages")


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    """Return an administrator's switch that offers huge pages, whatever this machine's says."""
    file = tmp_path / "enabled"
    file.write_text(OFFERED)
    return file


def move(pages: int, switch: Path) -> tuple[int, int, int]:
    """Move a process of which so many pages in 512 are in use.

    Returns:
        The bytes said to be moved, and by how many KiB its memory and its huge pages grew.
    """
    command = [sys.executable, "-c", MOVE, str(BLOCKS), str(pages), str(switch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, memory, huge = map(int, done.stdout.split())
    return said, memory, huge


@needs_huge_pages
@pytest.mark.parametrize("pages", [PAGES, PAGES * 31 // 32])
def test_memory_in_use_moves_to_huge_pages(pages: int, switch: Path) -> None:
    said, memory, huge = move(pages, switch)
    assert said >= BLOCKS * HUGE_PAGE
    assert huge >= BLOCKS * HUGE_PAGE // 1024
    assert memory <= BLOCKS * (PAGES - pages + 1) * PAGE // 1024 + SPARE_KIB


@needs_huge_pages
@pytest.mark.parametrize("pages", [4, PAGES * 3 // 4])
def test_memory_that_is_partly_in_use_stays_as_small_as_it_is(pages: int, switch: Path) -> None:
    said, memory, _ = move(pages, switch)
    assert said < BLOCKS // 2 * HUGE_PAGE
    assert memory <= SPARE_KIB


@needs_huge_pages
def test_an_administrator_s_never_is_heeded(switch: Path) -> None:
    switch.write_text("always madvise [never]\n")
    said, _, huge = move(PAGES, switch)
    assert (said, huge) == (0, 0)
    switch.write_text(OFFERED)
    assert move(PAGES, switch)[0] > 0


@needs_huge_pages
def test_the_switch_is_where_the_kernel_has_it() -> None:
    assert {"always", "madvise", "never"} == set(SWITCH.read_text().translate(NO_BRACKETS).split())


@needs_huge_pages
def test_a_system_that_tells_nothing_is_left_alone(tmp_path: Path) -> None:
    said, _, huge = move(PAGES, tmp_path / "missing")
    assert (said, huge) == (0, 0)


def test_only_private_memory_of_no_file_is_moved() -> None:
    maps = [
        "555555554000-555555556000 r--p 00000000 fe:00 1234                       /usr/bin/python3",
        "555555556000-555555756000 rw-p 00002000 fe:00 1234                       /usr/bin/python3",
        "555555756000-555555956000 rw-p 00000000 00:00 0                          [heap]",
        "7ffff0000000-7ffff0400000 rw-p 00000000 00:00 0 ",
        "7ffff0400000-7ffff0800000 r--p 00000000 00:00 0 ",
        "7ffff0800000-7ffff0c00000 rw-s 00000000 00:01 77                         /dev/zero (deleted)",
        "7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0                          [stack]",
    ]
    assert list(private_regions(maps)) == [
        (0x555555756000, 0x555555956000),
        (0x7FFFF0000000, 0x7FFFF0400000),
    ]


@pytest.mark.parametrize(
    ("begin", "end", "blocks"),
    [
        (0, HUGE_PAGE, [0]),
        (1, 2 * HUGE_PAGE, [HUGE_PAGE]),
        (4096, HUGE_PAGE + 4096, []),
        (HUGE_PAGE - 1, 3 * HUGE_PAGE + 5, [HUGE_PAGE, 2 * HUGE_PAGE]),
    ],
)
def test_huge_pages_lie_in_a_region_as_a_whole(begin: int, end: int, blocks: list[int]) -> None:
    assert list(huge_blocks(begin, end)) == blocks
