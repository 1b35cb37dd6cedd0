"""The open loop: every request is sent at its planned time, whatever became of the earlier ones."""

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flashbulb_service.bench.client import Client, Sample
from flashbulb_service.bench.workload import Planned

PROGRESS_S = 5.0


@dataclass
class Run:
    """The samples of one plan, and how well the generator itself kept up."""

    samples: list[Sample] = field(default_factory=list)
    unsent: int = 0  # the limit on requests in flight was hit
    peak_in_flight: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    interrupted: bool = False


Judge = Callable[[Sample], None]
Progress = Callable[[Run, int], None]


async def run_plan(
    client: Client,
    planned: Sequence[Planned],
    *,
    stop: asyncio.Event,
    judge: Judge,
    max_in_flight: int,
    keep_bytes: int = 256 << 20,
    progress: Progress | None = None,
) -> Run:
    """Send a plan and wait for every answer; after `stop`, send nothing more and abandon what is in flight.

    Answers are judged (decoded, hashed) when the last one is in, so that judging does not delay sending; only
    when more than `keep_bytes` of them wait is one judged at once.
    """
    run = Run()
    tasks: set[asyncio.Task[None]] = set()
    kept = 0
    start, cpu_start = time.perf_counter(), time.process_time()

    def clock() -> float:
        return time.perf_counter() - start

    def ended(sample: Sample, task: asyncio.Task[None]) -> None:
        nonlocal kept
        tasks.discard(task)
        size = len(sample.body or b"")
        if kept + size > keep_bytes:
            judge(sample)
        else:
            kept += size

    stopping = asyncio.create_task(stop.wait())
    next_progress = PROGRESS_S
    try:
        for request in planned:
            await _until(clock, request.offset_s, stopping)
            if stop.is_set():
                break
            if len(tasks) >= max_in_flight:
                run.unsent += 1
                continue
            sample = Sample(request)
            run.samples.append(sample)
            task = asyncio.create_task(client.send(sample, clock))
            tasks.add(task)
            task.add_done_callback(functools.partial(ended, sample))
            run.peak_in_flight = max(run.peak_in_flight, len(tasks))
            if progress and clock() >= next_progress:
                progress(run, len(tasks))
                next_progress += PROGRESS_S
        if tasks and not stop.is_set():
            answered = asyncio.create_task(_all_done(tuple(tasks)))
            await asyncio.wait({stopping, answered}, return_when=asyncio.FIRST_COMPLETED)
            answered.cancel()
    finally:
        stopping.cancel()
        left = list(tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(stopping, *left, return_exceptions=True)
    run.interrupted = stop.is_set()
    run.wall_s, run.cpu_s = clock(), time.process_time() - cpu_start
    for sample in run.samples:
        judge(sample)
    return run


async def _all_done(tasks: Sequence["asyncio.Task[None]"]) -> None:
    await asyncio.wait(tasks)


async def _until(clock: Callable[[], float], offset_s: float, stopping: "asyncio.Task[bool]") -> None:
    """Sleep until a time of the plan, or until told to stop."""
    wait_s = offset_s - clock()
    if wait_s <= 0:
        await asyncio.sleep(0)  # we are late: let answers be read, but do not wait
        return
    await asyncio.wait({stopping}, timeout=wait_s)


async def run_closed(
    client: Client, planned: Sequence[Planned], *, concurrency: int, seconds: float, stop: asyncio.Event
) -> Run:
    """Keep `concurrency` requests in flight for some seconds, to find what a server can do at most."""
    run = Run()
    start, cpu_start = time.perf_counter(), time.process_time()

    def clock() -> float:
        return time.perf_counter() - start

    position = 0

    async def one_after_another() -> None:
        nonlocal position
        while clock() < seconds and not stop.is_set():
            request = planned[position % len(planned)]
            position += 1
            sample = Sample(Planned(clock(), request.picture, request.tenant, request.deadline_ms))
            run.samples.append(sample)
            await client.send(sample, clock)
            if not sample.answered:
                await asyncio.sleep(0.05)  # a refused client that comes back at once measures refusals

    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    run.wall_s, run.cpu_s = clock(), time.process_time() - cpu_start
    run.interrupted = stop.is_set()
    return run
