"""Flashbulb beside a FastAPI loop, LitServe and Ray Serve around the same student, under the same load, in one run.

    benchmarks/peers/make_venvs.sh FOLDER
    python -m benchmarks peers --venvs FOLDER [--repeats 3] [--seconds 15] [--only flashbulb,fastapi] [--write]

Every peer runs student.py on the same bundle with the same number of onnxruntime threads and one model process, in
batches of at most 8 (but for the FastAPI loop, which has none), without needless padding and on huge pages, as
Flashbulb's worker has it; LitServe and Ray Serve wait 0 or 10 ms for a batch to fill. The same requests are sent at
the same times to each. Rates are multiples of what the bare student draws per second at its best batch size. The right
pixels are computed beforehand, without any server. In each repeat every server is started anew, in another order, and
has the machine for itself.
"""

import argparse
import asyncio
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import rig
from saturate import best_sizes
from student import Ask, BareStudent, open_as_worker

from flashbulb_service.bench.plot import draw_plot
from flashbulb_service.bench.report import summarise, table
from flashbulb_service.bench.session import Plan, Rate, run_session
from flashbulb_service.bench.validity import Drawn, draw_of
from flashbulb_service.bench.workload import Mix, Picture, Target, make_pool
from flashbulb_service.images import encode_image

NAME = "peers"
BATCH = 8
START_S = 120.0
STOP_S = 30.0
# name -> (virtual environment, app, wait for a batch in ms)
PEERS: Mapping[str, tuple[str, str, float]] = {
    "fastapi": ("fastapi", "fastapi_app.py", 0),
    "litserve-0": ("litserve", "litserve_app.py", 0),
    "litserve-10": ("litserve", "litserve_app.py", 10),
    "ray-0": ("ray", "ray_app.py", 0),
    "ray-10": ("ray", "ray_app.py", 10),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--venvs", type=Path, required=True, help="what make_venvs.sh built")
    parser.add_argument("--only", default=",".join(["flashbulb", *PEERS]), help="names, separated by commas")
    parser.add_argument("--rates", default="0.5,0.8,1,1.3", help="multiples of the bare student")
    parser.add_argument(
        "--bare-rate", type=float, default=None, help="pictures/s of it, instead of measuring"
    )
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--warm-up", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slo-ms", type=float, default=100.0)
    parser.add_argument("--pool", type=int, default=4000, help="different pictures, each with its own prompt")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    unknown = [name for name in names if name not in ("flashbulb", *PEERS)]
    missing = [
        venv for venv in {PEERS[n][0] for n in names if n in PEERS} if not _python(args.venvs, venv).exists()
    ]
    if unknown or missing:
        parser.error(f"unknown: {unknown}, not in {args.venvs}: {missing}; see make_venvs.sh")
    student = open_as_worker(args.bundle, threads=args.threads, batch=BATCH)
    bare_rate = args.bare_rate or max(best_sizes(student).values())
    prompts = tuple(picture.prompt for picture in rig.different_pictures(args.pool))
    plan = Plan(
        target=Target(""),
        mix=Mix(prompts=prompts, pool=args.pool),
        rates=tuple(Rate(round(float(text) * bare_rate, 2)) for text in args.rates.split(",")),
        seconds=args.seconds,
        warm_up_s=args.warm_up,
        repeats=1,
        slo_ms=args.slo_ms,
    )
    right = references(student, make_pool(plan.mix))
    del student
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(args.repeats):
        for name in random.Random(repeat).sample(names, len(names)):
            rig.say(f"{name}, {repeat + 1} of {args.repeats}")
            with server(name, args) as address:
                told[name].append(rig.run(lambda address=address: load(plan, address, right)))
    summaries = {
        name: [summarise([run["points"][at]["repeats"][0] for run in runs]) for at in range(len(plan.rates))]
        for name, runs in told.items()
    }
    for name, points in summaries.items():
        print(f"\n{name}\n\n{table(points)}")
    result = {
        "bare_pictures_per_s": bare_rate,
        "rates": args.rates,
        "slo_ms": args.slo_ms,
        "seconds": args.seconds,
        "pool": args.pool,
        "threads": args.threads,
        "batch": BATCH,
        "versions": {
            venv: freeze(args.venvs, venv) for venv in sorted({PEERS[n][0] for n in names if n in PEERS})
        },
        "peers": {
            name: {
                "summary": summaries[name],
                "alone_ms": [run["alone_ms"] for run in runs],
                "runs": [[point["repeats"][0] for point in run["points"]] for run in runs],
            }
            for name, runs in told.items()
        },
    }
    rig.finish(NAME, result, write=args.write)
    if args.write:
        plot = draw_plot("The same student behind different servers", summaries)
        (rig.RESULTS / f"{NAME}.svg").write_text(plot, encoding="utf-8")
    return 0


def references(student: BareStudent, pool: Sequence[Picture]) -> dict[Picture, Drawn]:
    """Draw every picture of the pool without a server."""
    found = {}
    for start in range(0, len(pool), BATCH):
        batch = pool[start : start + BATCH]
        for picture, pixels in zip(batch, student.draw([Ask(p.prompt, p.seed) for p in batch]), strict=True):
            found[picture] = draw_of([encode_image(pixels, "png")])
    return found


async def load(plan: Plan, address: str, right: Mapping[Picture, Drawn]) -> dict[str, Any]:
    """Measure one server at every rate."""
    target = dataclasses.replace(plan.target, base_url=f"{address}/v1")
    return await run_session(dataclasses.replace(plan, target=target), asyncio.Event(), rig.say, right)


@contextmanager
def server(name: str, args: argparse.Namespace) -> Iterator[str]:
    """Run one server while this is open."""
    if name == "flashbulb":
        with rig.serving(args.bundle, threads=args.threads, max_batch=str(BATCH)) as ours:
            yield ours.url
        return
    venv, app, wait_ms = PEERS[name]
    port = free_port()
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([rig.clean_environment()["PYTHONPATH"], str(here), str(here / "peers")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [_python(args.venvs, venv), here / "peers" / app, "--bundle", args.bundle, "--port", str(port)]
    command += ["--threads", str(args.threads), "--batch", str(BATCH), "--wait-ms", str(wait_ms)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            if not rig.run(lambda: answers(f"http://127.0.0.1:{port}", process))["ready"]:
                log.seek(0)
                raise SystemExit(f"{name} did not start: {log.read()[-3000:].decode(errors='replace')}")
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)


async def answers(address: str, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """Ask until a server draws its first picture."""
    until = time.monotonic() + START_S
    body = {"prompt": "dog", "seed": 1}
    async with aiohttp.ClientSession() as http:
        while time.monotonic() < until and process.poll() is None:
            try:
                async with http.post(f"{address}/v1/images/generations", json=body) as answer:
                    if answer.status == 200:
                        return {"ready": True}
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
    return {"ready": False}


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a server and whatever it started in its session."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            rig.say("  does not stop: killed")
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def freeze(venvs: Path, venv: str) -> dict[str, str]:
    """Return the versions that matter of an environment."""
    lines = subprocess.run(
        [_python(venvs, venv), "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    pins = dict(line.split("==", 1) for line in lines if "==" in line)
    wanted = ("fastapi", "uvicorn", "litserve", "ray", "onnxruntime", "numpy", "pillow")
    return {name: pins[name] for name in wanted if name in pins}


def _python(venvs: Path, venv: str) -> Path:
    return venvs / venv / "bin" / "python"


if __name__ == "__main__":
    sys.exit(main())
