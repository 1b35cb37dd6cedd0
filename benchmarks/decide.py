"""How long a worker takes to decide and to look, with a thousand requests waiting.

    python -m benchmarks decide [--waiting 1000] [--rounds 500] [--write]

`plan_ms` is the decision alone, a pure function: over all that waits, as the simulation calls it, and over what a
worker is shown of it (a bounded part). `claim_ms` is the whole claim of a batch on a real Valkey: look, decide, take.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rig

from flashbulb_service.bench.report import distribution
from flashbulb_service.embedded import EmbeddedServer
from flashbulb_service.jobs import NewJob
from flashbulb_service.queue import Queue
from flashbulb_service.scheduler import BucketFacts, BucketWindow, Plan, Waiting, Window, plan_batch
from flashbulb_service.timing import Tau

NAME = "decide"
MODEL, BUCKET, CAP, TENANTS = "emoji@1", "64x64", 8, 8
FACTS = BucketFacts(CAP, Tau(17.0, 4.3, 4.93, 1.2))


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=500)
    args = parser.parse_args(argv)
    result = rig.run(lambda: measure(args.waiting, args.rounds))
    rig.finish(NAME, {**result, "waiting": args.waiting, "cap": CAP, "tenants": TENANTS}, write=args.write)
    return 0


async def measure(waiting: int, rounds: int) -> dict[str, Any]:
    """Time decisions and claims."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        async with Queue.connect(server.url) as queue:
            await fill(queue, waiting)
            shown = await queue.window("w", [MODEL], 2 * CAP)
            claims = []
            for _ in range(rounds):
                start = time.perf_counter()
                jobs = await queue.claim("w", [MODEL], CAP, 60.0, plan=decide)
                claims.append((time.perf_counter() - start) * 1000)
                await queue.release("w", jobs)
    return {
        "plan_ms": {
            "all that waits": distribution(timed(everything(waiting), rounds)),
            f"the {len(shown.buckets[0].rows)} rows that are shown": distribution(timed(shown, rounds)),
        },
        "claim_ms": distribution(claims),
    }


async def fill(queue: Queue, waiting: int) -> None:
    """Let jobs of several tenants wait in one bucket."""
    for number in range(waiting):
        job = NewJob(MODEL, BUCKET, b"p" * 200, tenant=f"tenant-{number % TENANTS}", deadline_s=3600.0)
        await queue.enqueue([job], awaited=False)


def everything(waiting: int) -> Window:
    """Return a window that shows all of it."""
    rows = tuple(
        Waiting(f"{number:08}", f"tenant-{number % TENANTS}", 1e6 + number, 1e7, 1.0, 1.0, is_suspect=False)
        for number in range(waiting)
    )
    used = {f"tenant-{number}": 10.0 * number for number in range(TENANTS)}
    return Window(0.0, (BucketWindow(MODEL, BUCKET, rows, waiting),), used, {}, 0, 1)


def decide(window: Window) -> Plan | None:
    """Decide with a known batch time."""
    return plan_batch(window, lambda _model, _bucket: FACTS)


def timed(window: Window, rounds: int) -> list[float]:
    """Return the milliseconds of decisions."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        plan = decide(window)
        times.append((time.perf_counter() - start) * 1000)
        assert plan is not None
        assert len(plan.take) == CAP
    return times


if __name__ == "__main__":
    sys.exit(main())
