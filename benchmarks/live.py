"""The live server on the synthetic device beside the simulation, given the very same arrivals: do they agree?

    python -m benchmarks live [--scale 4] [--loads 1,1.5,2] [--noise 0] [--seconds 40] [--repeats 2] [--write]

The device takes tau(b) = max(17, 4.3 + 4.93 b) ms times --scale, in batches of at most 8; the objective is
100 ms times --scale. The scale is there because API, worker, Valkey and generator share the cores: at 1 they,
not the device, would set the limit. Requests carry the objective less --overhead-ms (HTTP, picture encoding and
storing, which no device does) as their deadline, and the simulation has that deadline too; on time is what the client
gets within the objective. Every answer's pixels are compared with the right ones. The verdict is good when goodput is
within 10 % of the simulation's at every load, 99 % of the answers are on time, and no pixel is wrong.
"""

import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import rig

from flashbulb_distill.bundle import open_bundle
from flashbulb_service.backends import ImageRequest
from flashbulb_service.backends.synthetic import SyntheticDevice, draw
from flashbulb_service.bench.client import connect
from flashbulb_service.bench.openloop import run_plan
from flashbulb_service.bench.report import Slo, Trust, interval, measure
from flashbulb_service.bench.validity import Drawn, Judge, draw_of
from flashbulb_service.bench.workload import Mix, Picture, Planned, Target, make_pool, plan
from flashbulb_service.images import encode_image
from flashbulb_service.simulate import Arrival, Outcome, simulate
from flashbulb_service.timing import Tau

NAME = "live"
CAP = 8
SLO_MS = 100.0
MAX_GAP = 0.1
MIN_ON_TIME = 0.99
MARGIN_SIGMAS = 1.645  # the worker's margin is the 95 % point of what it measures


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--scale", type=float, default=4.0, help="of the device's times and of the objective")
    parser.add_argument("--loads", default="1,1.5,2", help="multiples of the device's capacity")
    parser.add_argument("--noise", type=float, default=0.0, help="sigma of log-normal noise on batch times")
    parser.add_argument("--overhead-ms", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--warm-up", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(argv)
    shape = SyntheticDevice()
    device = SyntheticDevice(
        floor_ms=shape.floor_ms * args.scale,
        base_ms=shape.base_ms * args.scale,
        row_ms=shape.row_ms * args.scale,
        noise=args.noise,
    )
    loads = [float(text) for text in args.loads.split(",")]
    pool = make_pool(Mix(pool=200))
    right = references(args, pool)
    settings = {"backend": "synthetic", "synthetic": device.model_dump_json(), "max_batch": str(CAP)}
    told: dict[float, list[dict[str, Any]]] = {load: [] for load in loads}
    with rig.serving(args.bundle, threads=args.threads, **settings) as server:
        for repeat in range(args.repeats):
            for load in loads:  # by turns, so that a slow minute hits all loads
                told[load].append(
                    rig.run(
                        lambda load=load, repeat=repeat: compare(
                            server.url, args, device, load, repeat, pool, right
                        )
                    )
                )
                rig.say(f"{load:g}x, {repeat + 1} of {args.repeats}: {short(told[load][-1])}")
    points = {f"{load:g}x": summary(runs) for load, runs in told.items()}
    verdict = {
        "goodput_follows": all(
            abs(point["live_over_simulated"]["mean"] - 1) <= MAX_GAP for point in points.values()
        ),
        "served_on_time": all(point["live_on_time"]["mean"] >= MIN_ON_TIME for point in points.values()),
        "right_pixels": all(run["live"]["wrong_pixels"] == 0 for runs in told.values() for run in runs),
        "generator_kept_up": not any(run["live"]["invalid"] for runs in told.values() for run in runs),
    }
    result = {
        "verdict": {"good": all(verdict.values()), **verdict},
        "capacity_rps": round(capacity_rps(device), 2),
        "slo_ms": SLO_MS * args.scale,
        "overhead_ms": args.overhead_ms,
        "device": device.model_dump(),
        "cap": CAP,
        "points": points,
        "runs": {f"{load:g}x": runs for load, runs in told.items()},
    }
    rig.finish(NAME, result, write=args.write)
    return 0 if result["verdict"]["good"] else 1


def capacity_rps(device: SyntheticDevice) -> float:
    """Return what the device serves per second in full batches."""
    return CAP / Tau(device.floor_ms, device.base_ms, device.row_ms)(CAP) * 1000


def references(args: Any, pool: Sequence[Picture]) -> dict[Picture, Drawn]:
    """Draw what the synthetic device draws, without any server."""
    shape = open_bundle(args.bundle).manifest.shapes[0]
    found = {}
    for picture in pool:
        request = ImageRequest(picture.prompt, picture.seed, 0, shape.width, shape.height)
        found[picture] = draw_of([encode_image(draw(request), "png")])
    return found


async def compare(
    url: str,
    args: Any,
    device: SyntheticDevice,
    load: float,
    repeat: int,
    pool: Sequence[Picture],
    right: Mapping[Picture, Drawn],
) -> dict[str, Any]:
    """Offer one load to the server, and the same arrivals to the simulation."""
    slo_ms = SLO_MS * args.scale
    deadline_ms = slo_ms - args.overhead_ms
    rate = load * capacity_rps(device)
    planned = plan(
        Mix(deadlines_ms=((round(deadline_ms), 1.0),)),
        pool,
        rate=rate,
        seconds=args.warm_up + args.seconds,
        cv=1.0,
        repeat=repeat,
    )
    async with connect(Target(f"{url}/v1"), timeout_s=60) as client:
        run = await run_plan(
            client, planned, stop=asyncio.Event(), judge=Judge("reference", right), max_in_flight=2000
        )
    told = measure(
        run, slo=Slo(slo_ms), warm_up_s=args.warm_up, seconds=args.seconds, offered=rate, trust=Trust()
    )
    return {
        "live": {
            "goodput_rps": told["goodput_rps"],
            "on_time_of_answered": told["on_time_of_answered"],
            "refused": share(told, "429 deadline_unreachable"),
            "dropped": share(told, "504 deadline_exceeded"),
            "wrong_pixels": told["errors"].get("200 wrong_pixels", 0),
            "errors": told["errors"],
            "latency_ms": told["latency_ms"],
            "mean_batch": told["mean_batch"],
            "overhead_ms": told["overhead_ms"],
            "generator": told["generator"],
            "invalid": told["invalid"],
        },
        "simulated": simulated(args, device, planned, deadline_ms),
        "offered_rps": round(told["sent_rps"], 3),
    }


def simulated(
    args: Any, device: SyntheticDevice, planned: Sequence[Planned], deadline_ms: float
) -> dict[str, Any]:
    """Run the arrivals in simulated time; count those that the measurement counts."""
    margin = math.exp(MARGIN_SIGMAS * args.noise)
    tau = Tau(device.floor_ms, device.base_ms, device.row_ms, margin)
    arrivals = [Arrival(request.offset_s * 1000, deadline_ms) for request in planned]
    outcomes = simulate(arrivals, {"b": tau}, {"b": CAP}, noise=args.noise, seed=1)
    start, end = args.warm_up * 1000, (args.warm_up + args.seconds) * 1000
    counted = [one for one in outcomes if start <= one.arrival.at_ms < end]
    done = [one for one in counted if one.fate == "done"]
    return {
        "goodput_rps": round(sum(one.is_on_time for one in done) / args.seconds, 4),
        "on_time_of_answered": round(sum(one.is_on_time for one in done) / len(done), 6),
        **{
            fate: round(sum(one.fate == fate for one in counted) / len(counted), 6)
            for fate in ("refused", "dropped")
        },
        "ms_to_no": mean_ms_to_no(counted),
        "mean_batch": round(len(done) / sum(1 / one.batch_size for one in done), 3),
    }


def mean_ms_to_no(outcomes: Sequence[Outcome]) -> float | None:
    """Return how long a client that gets no picture waits for that answer."""
    waits = [one.end_ms - one.arrival.at_ms for one in outcomes if one.fate != "done"]
    return round(sum(waits) / len(waits), 2) if waits else None


def share(told: Mapping[str, Any], label: str) -> float:
    """Return the share of the requests that ended with a status and code."""
    return round(told["errors"].get(label, 0) / max(1, told["sent"]), 6)


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the repeats of one load."""
    return {
        "live_goodput_rps": interval([run["live"]["goodput_rps"] for run in runs]),
        "simulated_goodput_rps": interval([run["simulated"]["goodput_rps"] for run in runs]),
        "live_over_simulated": interval(
            [run["live"]["goodput_rps"] / run["simulated"]["goodput_rps"] for run in runs]
        ),
        "live_on_time": interval([run["live"]["on_time_of_answered"] or 0.0 for run in runs]),
    }


def short(run: Mapping[str, Any]) -> str:
    """Say one comparison in a line."""
    live, simulation = run["live"], run["simulated"]
    return (
        f"goodput {live['goodput_rps']:.1f}/s, simulated {simulation['goodput_rps']:.1f}/s; "
        f"on time {live['on_time_of_answered']}"
    )


if __name__ == "__main__":
    sys.exit(main())
