"""One process at a time writes a store of pairs, whatever machine it runs on; a killed one holds nothing."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK = ".lock"


@contextmanager
def only_writer(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Be the one that writes the store; wait while another process is.

    Args:
        waiting: called once where there is something to wait for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        if not _take(file):
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_written(folder: Path) -> bool:
    """Tell whether a process writes the store just now."""
    if not (folder / LOCK).exists():
        return False
    with (folder / LOCK).open("a") as file:
        return not _take(file)


def _take(file: IO[str]) -> bool:
    """Lock a file, until it is closed; False where another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
