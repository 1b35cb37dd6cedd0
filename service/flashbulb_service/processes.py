"""Child processes that do not outlive us."""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from flashbulb_service.errors import ServiceError

log = logging.getLogger(__name__)

MAX_BACKOFF_S = 5.0
FIRST_BACKOFF_S = 0.2
MAX_EARLY_DEATHS = 3


class ChildFailed(ServiceError):
    """A child process ends as soon as it starts."""

    code = "child_failed"


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent ends, however it ends (Linux).

    Raises:
        SystemExit: the parent has ended already.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise SystemExit(f"expected process {parent_pid} as parent, but it has ended")


async def keep_running(
    name: str,
    command: Sequence[str],
    env: Mapping[str, str],
    started: asyncio.Event,
    *,
    stop_s: float,
    pass_fds: Sequence[int] = (),
) -> None:
    """Run a command, and again when it ends, until this task is cancelled; then stop it.

    Stopping is SIGTERM, and SIGKILL after `stop_s`.

    Args:
        started: once set, the command is known to be able to start, and is restarted for ever.
        pass_fds: descriptors that every child gets under their numbers; they stay ours.

    Raises:
        ChildFailed: it ended several times before `started` was set.
    """
    deaths = 0
    backoff_s = FIRST_BACKOFF_S
    while True:
        # A session of its own: Ctrl-C reaches only us, and we stop the child when its work is done.
        child = await asyncio.create_subprocess_exec(
            *command, env=dict(env), start_new_session=True, pass_fds=tuple(pass_fds)
        )
        try:
            code = await child.wait()
        finally:
            await _stop(child, stop_s)
        deaths += 1
        if not started.is_set() and deaths >= MAX_EARLY_DEATHS:
            raise ChildFailed(
                f"{name} ended {deaths} times at its start, last with code {code}: its log is above"
            )
        log.error("%s ended with code %d, starting it again in %.1f s", name, code, backoff_s)
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)


async def _stop(child: asyncio.subprocess.Process, stop_s: float) -> None:
    if child.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        await asyncio.wait_for(child.wait(), stop_s)
    except TimeoutError:
        log.warning("process %d did not stop in %.0f s: killing it", child.pid, stop_s)
        child.kill()
        await child.wait()


def stop_on_signals() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
