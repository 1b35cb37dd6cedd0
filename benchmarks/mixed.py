"""Pictures at half of a device's capacity, with and without videos back to back: what do the videos cost a picture?

    python -m benchmarks mixed [--scale 4] [--load 0.5] [--seconds 40] [--repeats 2] [--write]

One server with a student of pictures and one of videos (--video), on the synthetic device: pictures take
max(17, 4.3 + 4.93 b) ms times --scale in batches of at most 8, a step of a video --step-ms times --scale. The same
Poisson arrivals of pictures come without videos and beside them, by turns; of videos, one is always being made and
one waits. The verdict is good when the pictures' p99 rises by at most one step, videos went on meanwhile, and every
request for a picture was answered.
"""

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import rig

from flashbulb_distill.bundle import open_bundle
from flashbulb_service.backends.synthetic import SyntheticDevice
from flashbulb_service.bench.client import connect
from flashbulb_service.bench.openloop import run_plan
from flashbulb_service.bench.workload import Mix, Target, make_pool, plan
from flashbulb_service.catalog import row_tokens
from flashbulb_service.timing import Tau

NAME = "mixed"
CAP = 8
IN_FLIGHT = 2  # videos


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--video", type=Path, default=rig.ROOT / "models" / "emoji-motion" / "1")
    parser.add_argument("--scale", type=float, default=4.0, help="of all times of the device")
    parser.add_argument("--step-ms", type=float, default=96.0, help="of a video, before --scale")
    parser.add_argument(
        "--load", type=float, default=0.5, help="of pictures: a share of the device's capacity"
    )
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--warm-up", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(argv)
    shape = SyntheticDevice()
    manifest = open_bundle(args.video).manifest
    steps, frames = len(manifest.time_steps), manifest.shapes[0].frames
    tau = Tau(shape.floor_ms * args.scale, shape.base_ms * args.scale, shape.row_ms * args.scale)
    step_ms = args.step_ms * args.scale
    device = SyntheticDevice(
        floor_ms=tau.floor_ms,
        base_ms=tau.base_ms,
        row_ms=tau.row_ms,
        frame_ms=(step_ms - tau(1) / steps) / frames,
    )
    rate = args.load * CAP / tau(CAP) * 1000
    runs: dict[str, list[dict[str, Any]]] = {"alone": [], "beside": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = folder / "models"
        for bundle in (args.bundle, args.video):
            (models / bundle.parent.name).mkdir(parents=True)
            (models / bundle.parent.name / bundle.name).symlink_to(bundle.resolve(), target_is_directory=True)
        settings = {
            "backend": "synthetic",
            "synthetic": device.model_dump_json(),
            "max_batch": str(CAP),
            # Videos run alone, so that a step has one length.
            "max_batch_tokens": str(max(row_tokens(manifest))),
        }
        server = rig.Server(folder, models, threads=args.threads, settings=settings)
        try:
            for repeat in range(args.repeats):
                for kind, told in runs.items():  # by turns, so that a slow minute hits both
                    count = IN_FLIGHT if kind == "beside" else 0
                    told.append(
                        rig.run(
                            lambda repeat=repeat, count=count: offer(server.url, args, rate, repeat, count)
                        )
                    )
                    rig.say(f"{kind}, {repeat + 1} of {args.repeats}: {told[-1]}")
        finally:
            server.stop()
    p99 = {kind: statistics.fmean(run["p99_ms"] for run in told) for kind, told in runs.items()}
    rise = p99["beside"] - p99["alone"]
    verdict = {
        "at_most_one_step": rise <= step_ms,
        "videos_went_on": all(run["videos"] > 0 for run in runs["beside"]),
        "all_answered": all(run["failed"] == 0 for told in runs.values() for run in told),
    }
    result = {
        "verdict": {"good": all(verdict.values()), **verdict},
        "p99_ms": {kind: round(ms, 1) for kind, ms in p99.items()},
        "rise_ms": round(rise, 1),
        "step_ms": step_ms,
        "rise_in_steps": round(rise / step_ms, 2),
        "pictures_per_s": round(rate, 2),
        "device": device.model_dump(),
        "cap": CAP,
        "runs": runs,
    }
    rig.finish(NAME, result, write=args.write)
    return 0 if result["verdict"]["good"] else 1


async def offer(url: str, args: Any, rate: float, repeat: int, num_videos: int) -> dict[str, Any]:
    """Offer the pictures of one measurement, beside so many videos at a time."""
    pool = make_pool(Mix(pool=200))
    planned = plan(Mix(), pool, rate=rate, seconds=args.warm_up + args.seconds, cv=1.0, repeat=repeat)
    stop = asyncio.Event()
    async with aiohttp.ClientSession() as session, connect(Target(f"{url}/v1"), timeout_s=60) as client:
        making = [asyncio.create_task(make_videos(session, url, stop)) for _ in range(num_videos)]
        run = await run_plan(
            client, planned, stop=asyncio.Event(), judge=lambda sample: None, max_in_flight=2000
        )
        stop.set()
        videos = sum(await asyncio.gather(*making))
    counted = [sample for sample in run.samples if sample.planned.offset_s >= args.warm_up]
    latencies = [sample.latency_ms for sample in counted if sample.status == 200]
    return {
        "pictures": len(counted),
        "failed": len(counted) - len(latencies),
        "p50_ms": round(statistics.median(latencies), 1),
        "p99_ms": round(statistics.quantiles(latencies, n=100)[98], 1),
        "videos": videos,
    }


async def make_videos(session: aiohttp.ClientSession, url: str, stop: asyncio.Event) -> int:
    """Make one video after another until `stop`; return how many were completed. The last one is deleted."""
    made = 0
    while not stop.is_set():
        async with session.post(f"{url}/v1/videos", json={"prompt": "rocket flying up"}) as answer:
            answer.raise_for_status()
            video, wait_ms = await answer.json(), int(answer.headers["openai-poll-after-ms"])
        while video["status"] in ("queued", "in_progress") and not stop.is_set():
            await asyncio.sleep(wait_ms / 1000)
            async with session.get(f"{url}/v1/videos/{video['id']}") as answer:
                video, wait_ms = await answer.json(), int(answer.headers.get("openai-poll-after-ms", 0))
        made += video["status"] == "completed"
        await (await session.delete(f"{url}/v1/videos/{video['id']}")).read()
    return made


if __name__ == "__main__":
    sys.exit(main())
