"""What the server adds to one picture at light load: HTTP in to HTTP out, less model time and picture encoding.

    python -m benchmarks overhead [--requests 400] [--pause-ms 50] [--write]

One request at a time over one kept connection, and beside each, by turns and after the same pause, the same picture by
the bare student in this process: its graphs (with tokenising, noise and rounding to bytes) and its PNG, timed apart.
A latency runs from the first byte of the request to the arrival of the answer's last byte, on a plain socket: a client
library's own work is no part of it. The bare student's memory lies on huge pages as a worker's does: what they save the
model is not taken for a smaller overhead. The overhead of a request is its latency less the medians of model and PNG.
What the server itself reports is given as well, but not used: its encode_ms includes the result store.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import rig
from student import Ask, BareStudent, open_as_worker
from wire import Wire

from flashbulb_service.bench.client import Sample
from flashbulb_service.bench.report import distribution
from flashbulb_service.bench.validity import Drawn, Judge, draw_of
from flashbulb_service.bench.workload import Planned, Target, Tenant
from flashbulb_service.images import encode_image

NAME = "overhead"
WARM_UP = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--pause-ms", type=float, default=50.0)
    args = parser.parse_args(argv)
    student = open_as_worker(args.bundle, threads=args.threads, batch=1)
    with rig.serving(args.bundle, threads=args.threads) as server:
        result = measure(server.url, student, args.requests, args.pause_ms / 1000)
    rig.finish(NAME, {**result, "threads": args.threads, "pause_ms": args.pause_ms}, write=args.write)
    return 1 if result["wrong"] else 0


def measure(
    url: str, student: BareStudent, requests: int, pause_s: float, *, first: int = 0
) -> dict[str, Any]:
    """Time requests to a server and the bare work by turns. first: the number of its first picture."""
    samples: list[Sample] = []
    latency_ms, model_ms, png_ms = [], [], []
    references: dict[Any, Drawn] = {}
    target = Target(f"{url}/v1")
    with Wire(target.url) as wire:
        for picture in rig.different_pictures(WARM_UP + requests, first=first):
            time.sleep(pause_s)
            start = time.perf_counter()
            (pixels,) = student.draw([Ask(picture.prompt, picture.seed)])
            drawn = time.perf_counter()
            data = encode_image(pixels, "png")
            encoded = time.perf_counter()
            model_ms.append((drawn - start) * 1000)
            png_ms.append((encoded - drawn) * 1000)
            references[picture] = draw_of([data])
            sample = Sample(Planned(0.0, picture, Tenant("default")))
            body = target.body(sample.planned)
            time.sleep(pause_s)
            ms, sample.status, sample.body = wire.post(body)
            latency_ms.append(ms)
            samples.append(sample)
    judge = Judge("reference", references)
    for sample in samples:
        judge(sample)
    samples, latency_ms = samples[WARM_UP:], latency_ms[WARM_UP:]
    model_ms, png_ms = model_ms[WARM_UP:], png_ms[WARM_UP:]
    work = statistics.median(model_ms) + statistics.median(png_ms)
    right = [(sample, ms) for sample, ms in zip(samples, latency_ms, strict=True) if sample.valid]
    return {
        "overhead_ms": distribution([ms - work for _, ms in right]),
        "http_ms": distribution([ms for _, ms in right]),
        "model_ms": distribution(model_ms),
        "png_ms": distribution(png_ms),
        "server_says": {
            name: distribution(
                [sample.timings[name] for sample, _ in right if name in (sample.timings or {})]
            )
            for name in ("queue_ms", "batch_ms", "encode_ms", "total_ms")
        },
        "wrong": len(samples) - len(right),
    }


if __name__ == "__main__":
    sys.exit(main())
