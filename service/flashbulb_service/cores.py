"""How many processor cores this process may use."""

import contextlib
import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # in a container, its own


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Count the cores this process may run on, or a container's limit of processors where that is less, rounded up.

    Where the system does not tell (only Linux does), all of them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Return the limit in processors, inf without one; it is a share of time, and leaves all cores in sight."""
    with contextlib.suppress(OSError, ValueError):  # "max": none
        quota_us, period_us = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        return int(quota_us) / int(period_us)
    with contextlib.suppress(OSError, ValueError):  # the first version of cgroups; -1: none
        quota_us, period_us = (
            (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii")
            for name in ("quota", "period")
        )
        return int(quota_us) / int(period_us) if int(quota_us) > 0 else math.inf
    return math.inf
