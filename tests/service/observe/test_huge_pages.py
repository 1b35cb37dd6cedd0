"""What is in memory moves to huge pages, and what is not there is not brought in; told by the kernel itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from flashbulb_service.huge_pages import HUGE_PAGE, huge_blocks, private_regions

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
BLOCKS = 40

MOVE = """
import mmap, sys
from flashbulb_service.huge_pages import HUGE_PAGE, PAGE, use_huge_pages

def told():
    lines = [line.split() for line in open("/proc/self/smaps_rollup")]
    kib = {line[0]: int(line[1]) for line in lines if line[-1] == "kB"}
    return kib["Rss:"], kib["AnonHugePages:"]

blocks, every = int(sys.argv[1]), {"full": PAGE, "sparse": HUGE_PAGE // 4}[sys.argv[2]]
region = mmap.mmap(-1, (blocks + 1) * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
region.madvise(mmap.MADV_NOHUGEPAGE)
for place in range(0, len(region), every):
    region[place] = 1
region.madvise(mmap.MADV_HUGEPAGE)
memory, huge = told()
moved = use_huge_pages()
print(moved, *(now - before for now, before in zip(told(), (memory, huge))))
"""


def move(how: str) -> tuple[int, int, int]:
    """Return the bytes said to be moved, and by how many KiB memory and huge pages of a process grew."""
    command = [sys.executable, "-c", MOVE, str(BLOCKS), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, memory, huge = map(int, done.stdout.split())
    return said, memory, huge


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this system offers no huge pages"
)
def test_memory_in_use_moves_to_huge_pages() -> None:
    said, memory, huge = move("full")
    assert said >= BLOCKS * HUGE_PAGE
    assert huge >= BLOCKS * HUGE_PAGE // 1024
    assert memory <= HUGE_PAGE // 1024 * 4  # of the interpreter's own, whose last pages were not in use


def test_memory_that_is_hardly_in_use_stays_as_small_as_it_is() -> None:
    said, memory, _ = move("sparse")
    assert said < BLOCKS // 2 * HUGE_PAGE
    assert memory <= HUGE_PAGE // 1024 * 4


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
