"""Pictures per second of the whole server under full load, beside a bare onnxruntime loop, by turns in one run.

    python -m benchmarks saturate [--threads 1] [--rounds 5] [--concurrency 64] [--write]

The bare loop runs the three graphs at its best batch size, with token ids and noise ready, and throws its pixels
away; its memory lies on huge pages as a worker's does. The server does everything: HTTP, queue, tokenising, noise,
graphs, PNG, result store, JSON. No two requests share a prompt. Both have the same number of onnxruntime threads; the
rest of the server and the load generator use what other cores there are, so CPU seconds per picture are given as well,
by part.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import rig
from student import Ask, BareStudent

from flashbulb_service.bench.client import connect
from flashbulb_service.bench.openloop import run_closed
from flashbulb_service.bench.report import interval
from flashbulb_service.bench.validity import Judge
from flashbulb_service.bench.workload import Planned, Target, Tenant

NAME = "saturate"
SIZES = (1, 2, 4, 8, 16, 32)
ANYBODY = Tenant("default")


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bare-seconds", type=float, default=5.0)
    parser.add_argument("--server-seconds", type=float, default=12.0)
    parser.add_argument("--concurrency", type=int, default=64)
    args = parser.parse_args(argv)
    student = BareStudent(args.bundle, threads=args.threads)
    student.warm_up(student.bundle.manifest.max_batch)
    by_size = best_sizes(student)
    best = max(by_size, key=lambda size: by_size[size])
    bare, served = [], []
    with rig.serving(args.bundle, threads=args.threads) as server:
        for turn in range(args.rounds + 1):  # the first round warms up
            one = bare_round(student, best, args.bare_seconds)
            other = rig.run(
                lambda turn=turn: server_round(server, args.concurrency, args.server_seconds, turn)
            )
            if turn:
                bare.append(one)
                served.append(other)
    result = {
        "bare_by_batch_size": by_size,
        "best_batch_size": best,
        "bare": bare,
        "server": served,
        "ratio_wall": interval(
            [
                round_["pictures_per_s"] / base["pictures_per_s"]
                for round_, base in zip(served, bare, strict=True)
            ]
        ),
        "ratio_worker_cpu": interval(
            [
                base["cpu_ms_per_picture"] / round_["cpu_ms_per_picture"]["worker"]
                for round_, base in zip(served, bare, strict=True)
            ]
        ),
        "wrong": sum(round_["wrong"] for round_ in served),
        "threads": args.threads,
        "concurrency": args.concurrency,
    }
    rig.finish(NAME, result, write=args.write)
    return 1 if result["wrong"] else 0


def best_sizes(student: BareStudent) -> dict[int, float]:
    """Return pictures per second by batch size, the median of 15 calls each."""
    found = {}
    for size in (size for size in SIZES if size <= student.bundle.manifest.max_batch):
        inputs = student.prepare([Ask(f"dog {row}", row) for row in range(size)])
        times = []
        for _ in range(16):
            start = time.perf_counter()
            student.run(inputs)
            times.append(time.perf_counter() - start)
        found[size] = round(size / statistics.median(times[1:]), 2)
    return found


def bare_round(student: BareStudent, size: int, seconds: float) -> dict[str, float]:
    """Run the graphs in a loop."""
    inputs = student.prepare([Ask(f"dog {row}", row) for row in range(size)])
    count = 0
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        student.run(inputs)
        count += size
    wall, used = time.perf_counter() - start, time.process_time() - cpu
    return {
        "pictures_per_s": round(count / wall, 2),
        "cpu_ms_per_picture": round(used / count * 1000, 3),
        "cores": round(used / wall, 3),
    }


async def server_round(server: rig.Server, concurrency: int, seconds: float, turn: int) -> dict[str, Any]:
    """Keep the server full; the first fifth of the time does not count."""
    parts = server.pids()
    planned = [
        Planned(0.0, picture, ANYBODY) for picture in rig.different_pictures(20_000, first=turn * 20_000)
    ]
    marks: list[tuple[float, dict[str, float]]] = []

    async def mark() -> None:
        begin = time.perf_counter()
        for at in (seconds / 5, seconds):
            await asyncio.sleep(at - (time.perf_counter() - begin))
            used = {part: rig.cpu_s(pid) for part, pid in parts.items()}
            marks.append((time.perf_counter() - begin, {**used, "generator": time.process_time()}))

    async with connect(Target(f"{server.url}/v1"), timeout_s=60) as client:
        marking = asyncio.create_task(mark())
        run = await run_closed(
            client, planned, concurrency=concurrency, seconds=seconds + 0.5, stop=asyncio.Event()
        )
        await marking
    judge = Judge("decodable", {})
    for sample in run.samples:
        judge(sample)
    (start, before), (end, after) = marks
    done = [sample for sample in run.samples if start <= sample.done_s < end and sample.valid]
    sizes = [sample.batch_size for sample in done if sample.batch_size]
    return {
        "pictures_per_s": round(len(done) / (end - start), 2),
        "cpu_ms_per_picture": {
            part: round((after[part] - before[part]) / max(1, len(done)) * 1000, 3) for part in after
        },
        "worker_cores": round((after["worker"] - before["worker"]) / (end - start), 3),
        "mean_batch": round(statistics.fmean(sizes), 2) if sizes else None,
        "wrong": sum(not sample.valid for sample in run.samples),
    }


if __name__ == "__main__":
    sys.exit(main())
