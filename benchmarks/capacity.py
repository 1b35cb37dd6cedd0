"""Does `flashbulb plan-capacity` say the truth? Its prediction beside what `flashbulb bench serve` measures.

    python -m benchmarks capacity [--scale 12] [--rates 0.5,0.9,1.5] [--p99-ms 900] [--noise 0.1] [--write]

The synthetic device takes tau(b) = max(17, 4.3 + 4.93 b) ms times --scale with log-normal noise, in batches of at
most 8, and is calibrated as a user does it (`flashbulb models calibrate`). The scale is there because API, workers,
Valkey and generator share the cores: the devices shall be the limit. For every rate (in multiples of one device's
capacity) the planner is asked, then a server with as many workers as it says gets that load for --seconds, and one
with the next smaller number that it called too few. What a request needs besides the device is measured before, on an
idle server. Requests carry the objective less that as their deadline, as the planner assumes. A measurement of a
minute has few requests, whose p99 scatters by a tenth: so the planner's simulation is also run on the very arrivals of
the measurement. The verdict is good when the planned number meets the objective (99 % of all requests within it, less
1 % for the scatter), the smaller number misses it, and on equal arrivals share and p99 are within --tolerance.
"""

import asyncio
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import rig
from live import references

from flashbulb_distill.bundle import open_bundle
from flashbulb_service.backends.synthetic import SyntheticDevice
from flashbulb_service.bench.session import Plan as Load
from flashbulb_service.bench.session import Rate, run_session
from flashbulb_service.bench.workload import Mix, Target, make_pool
from flashbulb_service.bench.workload import plan as draw_plan
from flashbulb_service.calibration import known_times
from flashbulb_service.capacity import SHARE_ON_TIME, Plan, plan_workers
from flashbulb_service.settings import Settings
from flashbulb_service.simulate import Arrival, simulate
from flashbulb_service.timing import Tau, fit_tau

NAME = "capacity"
CAP = 8
SCATTER = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--scale", type=float, default=12.0, help="of the device's times")
    parser.add_argument("--rates", default="0.5,0.9,1.5", help="multiples of one device's capacity")
    parser.add_argument("--p99-ms", type=float, default=900.0, help="the objective")
    parser.add_argument("--noise", type=float, default=0.1, help="sigma of log-normal noise on batch times")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--warm-up", type=float, default=8.0)
    parser.add_argument("--tolerance", type=float, default=0.15, help="of p99; of the share on time, a fifth")
    args = parser.parse_args(argv)
    shape = SyntheticDevice()
    device = SyntheticDevice(
        floor_ms=shape.floor_ms * args.scale,
        base_ms=shape.base_ms * args.scale,
        row_ms=shape.row_ms * args.scale,
        noise=args.noise,
    )
    settings = {"backend": "synthetic", "synthetic": device.model_dump_json(), "max_batch": str(CAP)}
    tau = calibrated(args.bundle, settings)
    capacity = CAP / Tau(device.floor_ms, device.base_ms, device.row_ms)(CAP) * 1000
    overhead_ms = measure_overhead(args, settings)
    rig.say(f"besides the device a request needs {overhead_ms:.1f} ms")
    points = []
    for text in args.rates.split(","):
        rate = float(text) * capacity
        plans = plan_workers(
            tau, CAP, rate_per_s=rate, p99_ms=args.p99_ms, overhead_ms=overhead_ms, noise=args.noise
        )
        for plan in plans[-2:]:
            points.append({"load": f"{text}x", **compare(args, settings, rate, tau, plan, overhead_ms)})
            rig.say(short(points[-1]))
    verdict = judge(points, args.tolerance)
    result = {
        "verdict": {"good": all(verdict.values()), **verdict},
        "objective_ms": args.p99_ms,
        "overhead_ms": round(overhead_ms, 1),
        "capacity_rps": round(capacity, 2),
        "device": device.model_dump(),
        "points": points,
    }
    rig.finish(NAME, result, write=args.write)
    return 0 if result["verdict"]["good"] else 1


def judge(points: Sequence[dict[str, Any]], tolerance: float) -> dict[str, bool]:
    """Say of each promise of the planner whether the measurements bear it out."""
    enough, few = (
        [one for one in points if one["planned"]["is_enough"] is is_enough] for is_enough in (True, False)
    )
    return {
        "planned_is_enough": all(
            one["measured"]["share_on_time"] >= SHARE_ON_TIME - SCATTER for one in enough
        ),
        "fewer_is_not": bool(few) and all(one["measured"]["share_on_time"] < SHARE_ON_TIME for one in few),
        "p99_follows": all(
            abs(one["measured"]["p99_ms"] / one["same_arrivals"]["p99_ms"] - 1) <= tolerance for one in points
        ),
        "share_follows": all(
            abs(one["measured"]["share_on_time"] - one["same_arrivals"]["share_on_time"]) <= tolerance / 5
            for one in points
        ),
        "generator_kept_up": not any(one["measured"]["invalid"] for one in points),
    }


def calibrated(bundle: Path, settings: dict[str, str]) -> Tau:
    """Calibrate the device as a user does, and read the times as the planner does."""
    with tempfile.TemporaryDirectory() as data:
        environment = rig.clean_environment() | {
            f"FLASHBULB_{name.upper()}": value for name, value in {**settings, "data": data}.items()
        }
        command = [sys.executable, "-m", "flashbulb_service.cli", "models", "calibrate", str(bundle)]
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
        times, where = known_times(open_bundle(bundle), Settings.model_validate({**settings, "data": data}))
        rig.say(f"times measured {where}: {times}")
        return fit_tau(times)


def measure_overhead(args: Any, settings: dict[str, str]) -> float:
    """Return what a request needs besides the device, in milliseconds, on a server that has nothing else to do."""
    load = Load(target=Target(""), mix=Mix(pool=20), rates=(Rate(1.0),), seconds=20.0, repeats=1, slo_ms=1e4)
    told = offer(args, settings, load, workers=1)
    return float(told["overhead_ms"]["p50"] + told["encode_ms"]["p50"])


def offer(args: Any, settings: dict[str, str], load: Load, *, workers: int) -> dict[str, Any]:
    """Measure a server of so many workers under a load."""
    with rig.serving(args.bundle, threads=1, workers=workers, **settings) as server:
        load = replace(load, target=Target(f"{server.url}/v1"))
        right = references(args, make_pool(load.mix))
        session = rig.run(lambda: run_session(load, asyncio.Event(), lambda _: None, right))
    found: dict[str, Any] = session["points"][0]["repeats"][0]
    return found


def compare(
    args: Any, settings: dict[str, str], rate: float, tau: Tau, plan: Plan, overhead_ms: float
) -> dict[str, Any]:
    """Offer the load to as many workers as a plan has."""
    wanted = Load(
        target=Target(""),
        mix=Mix(pool=200, deadlines_ms=((round(args.p99_ms - overhead_ms), 1.0),)),
        rates=(Rate(rate),),
        seconds=args.seconds,
        warm_up_s=args.warm_up,
        repeats=1,
        slo_ms=args.p99_ms,
    )
    told = offer(args, settings, wanted, workers=plan.workers)
    planned = {
        "workers": plan.workers,
        "is_enough": plan.is_enough,
        "share_on_time": round(plan.share_on_time, 4),
        "p50_ms": round(plan.p50_ms, 1),
        "p99_ms": round(plan.p99_ms, 1),
        "mean_batch": round(plan.mean_batch, 2),
    }
    measured = {
        "share_on_time": told["attainment"],
        "p50_ms": round(told["latency_ms"]["p50"], 1),
        "p99_ms": round(told["latency_ms"]["p99"], 1),
        "mean_batch": told["mean_batch"],
        "refused": told["shed"],
        "server_overhead_p50_ms": (told["server_overhead_ms"] or {}).get("p50"),
        "sent": told["sent"],
        "errors": told["errors"],
        "invalid": told["invalid"],
    }
    return {
        "rate_per_s": round(rate, 2),
        "planned": planned,
        "same_arrivals": on_same_arrivals(wanted, rate, tau, plan.workers, args.noise, overhead_ms),
        "measured": measured,
    }


def on_same_arrivals(
    load: Load, rate: float, tau: Tau, workers: int, noise: float, overhead_ms: float
) -> dict[str, float]:
    """Run the planner's simulation on the arrivals of a measurement; count what that counts."""
    seconds = load.warm_up_s + load.seconds
    requests = draw_plan(load.mix, make_pool(load.mix), rate=rate, seconds=seconds, cv=load.cv, repeat=0)
    (deadline_ms, _), *_ = load.mix.deadlines_ms
    arrivals = [Arrival(request.offset_s * 1000, float(deadline_ms or 0)) for request in requests]
    outcomes = simulate(arrivals, {"b": tau}, {"b": CAP}, num_workers=workers, noise=noise, seed=1)
    counted = [one for one in outcomes if one.arrival.at_ms >= load.warm_up_s * 1000]
    times = sorted(one.end_ms - one.arrival.at_ms + overhead_ms for one in counted if one.fate == "done")
    return {
        "share_on_time": round(sum(one.is_on_time for one in counted) / len(counted), 4),
        "p50_ms": round(times[len(times) // 2], 1),
        "p99_ms": round(times[math.ceil(0.99 * len(times)) - 1], 1),
    }


def short(point: dict[str, Any]) -> str:
    """Say one comparison in a line."""
    planned, same, measured = point["planned"], point["same_arrivals"], point["measured"]
    return (
        f"{point['rate_per_s']:.1f}/s on {planned['workers']}: on time {measured['share_on_time']:.1%} (planned "
        f"{planned['share_on_time']:.1%}, on these arrivals {same['share_on_time']:.1%}), "
        f"p99 {measured['p99_ms']:.0f} ms (planned {planned['p99_ms']:.0f}, on these {same['p99_ms']:.0f}), "
        f"batch {measured['mean_batch']:.1f} (planned {planned['mean_batch']:.1f})"
    )


if __name__ == "__main__":
    sys.exit(main())
