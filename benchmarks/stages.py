"""Where a picture's time goes at light load: the stages that it passes in API and worker, by marks in both processes.

    python -m benchmarks stages [--requests 200] [--pause-ms 50] [--write]

The processes are the real ones; `benchmarks/marks` wraps some of their functions while this runs, which costs a few
microseconds each. A stage is the median time from the mark before to its own. Where API and worker work at once, only
what the picture waits for is marked.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import rig
from wire import Wire

from flashbulb_service.bench.workload import Planned, Target, Tenant

NAME = "stages"
WARM_UP = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--pause-ms", type=float, default=50.0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MARKS_FOLDER": folder, "MARKS": str(Path(__file__).parent / "marks")}
        with rig.serving(args.bundle, threads=args.threads) as server:
            asked = ask(server, args.requests, args.pause_ms / 1000)
        marks = sorted(
            tuple(mark) for path in Path(folder).glob("*.json") for mark in json.loads(path.read_text())
        )
    result = {"stages_ms": stages(asked[WARM_UP:], marks), "requests": args.requests, "threads": args.threads}
    rig.finish(NAME, result, write=args.write)
    return 0


def ask(server: rig.Server, requests: int, pause_s: float) -> list[tuple[int, int]]:
    """Ask for pictures one by one; return when each began and ended, in nanoseconds of the monotonic clock."""
    target = Target(f"{server.url}/v1")
    asked = []
    with Wire(target.url) as wire:
        for picture in rig.different_pictures(WARM_UP + requests):
            body = target.body(Planned(0.0, picture, Tenant("default")))
            time.sleep(pause_s)
            start = time.monotonic_ns()
            _, status, _ = wire.post(body)
            asked.append((start, time.monotonic_ns()))
            assert status == 200
    return asked


def stages(asked: Sequence[tuple[int, int]], marks: Sequence[tuple[int, str]]) -> dict[str, float]:
    """Return the median milliseconds from each first mark inside a request to the next, in their usual order."""
    offsets: dict[str, list[float]] = {}
    for start, end in asked:
        seen: dict[str, float] = {}
        for at, name in marks:
            if start <= at <= end:
                seen.setdefault(name, (at - start) / 1e6)
        for name, offset in {**seen, "answer received": (end - start) / 1e6}.items():
            offsets.setdefault(name, []).append(offset)
    usual = {name: statistics.median(found) for name, found in offsets.items() if 2 * len(found) > len(asked)}
    ordered = sorted(usual.items(), key=lambda item: item[1])
    times = [0.0, *(offset for _, offset in ordered)]
    return {name: round(offset - before, 3) for (name, offset), before in zip(ordered, times, strict=False)}


if __name__ == "__main__":
    sys.exit(main())
