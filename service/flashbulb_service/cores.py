"""How many processor cores this process may use."""

import os


def usable_cores() -> int:
    """Count the cores this process may run on; where the system does not tell (only Linux does), all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
