"""What it costs when a Valkey of your own syncs before it answers: `appendfsync always` beside `everysec`, by turns.

    python -m benchmarks durability [--rounds 4] [--requests 150] [--folder DIR] [--write]

For each policy a server with the configuration of `deploy/make-secrets.sh` and that policy is started, its files under
--folder, and Flashbulb on it: the time of storing one job and of one picture at light load, one at a time, then
pictures per second with --concurrency in flight. `disk_ms` is an append of 600 bytes and its fdatasync in the same
folder: what an answer to a write waits for at `always`.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import rig
from saturate import ANYBODY, server_round
from wire import Wire

from flashbulb_service.bench.report import distribution, interval
from flashbulb_service.bench.workload import Planned, Target
from flashbulb_service.embedded import find_server
from flashbulb_service.jobs import NewJob
from flashbulb_service.queue import Queue

NAME = "durability"
POLICIES = ("everysec", "always")
PAUSE_S = 0.02
WARM_UP = 10


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=6.0, help="of full load")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="on the disk that is meant; default: temporary files")
    args = parser.parse_args(argv)
    found: dict[str, list[dict[str, Any]]] = {policy: [] for policy in POLICIES}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        disk = distribution(disk_ms(folder))
        for turn in range(args.rounds):
            for policy in POLICIES if turn % 2 else reversed(POLICIES):
                found[policy].append(measure(folder / f"{turn}-{policy}", policy, args, turn))
                rig.say(f"{policy}: {found[policy][-1]}")
    result = {
        "disk_ms": disk,
        **{policy: {key: interval([run[key] for run in runs]) for key in runs[0]} for policy, runs in found.items()},
        "threads": args.threads,
        "concurrency": args.concurrency,
        "requests": args.requests,
    }  # fmt: skip
    rig.finish(NAME, result, write=args.write)
    return 0


def disk_ms(folder: Path, count: int = 300) -> list[float]:
    """Time appends of 600 bytes, each until it is on the disk."""
    times = []
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(count):
            start = time.perf_counter()
            os.write(file.fileno(), b"x" * 600)
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - start) * 1000)
    return times


@contextmanager
def valkey(folder: Path, policy: str) -> Iterator[str]:
    """Run a server as compose.yaml does, with another policy and folder; its address."""
    folder.mkdir()
    subprocess.run(
        ["sh", rig.ROOT / "deploy" / "make-secrets.sh", folder / "secrets"], check=True, stdout=subprocess.DEVNULL
    )  # fmt: skip
    given = (folder / "secrets" / "valkey.conf").read_text(encoding="utf-8")
    password = given.split()[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = given.replace("dir /data", f"dir {folder}")
    config = f"{here}appendfsync {policy}\nbind 127.0.0.1\nport {port}\n"
    server = subprocess.Popen(
        [find_server(), "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdin is not None
        with server.stdin:
            server.stdin.write(config)
        url = f"redis://:{password}@127.0.0.1:{port}/0"
        with redis.Redis.from_url(url) as client:
            while True:
                try:
                    assert client.config_get("appendfsync")["appendfsync"] == policy
                    break
                except redis.ConnectionError:
                    assert server.poll() is None
                    time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def measure(folder: Path, policy: str, args: Any, turn: int) -> dict[str, float]:
    """Measure one policy once."""
    with valkey(folder, policy) as url:
        stored = rig.run(lambda: store_jobs(url, args.requests))["ms"]
        with redis.Redis.from_url(url) as client:
            client.flushall()
        with rig.serving(args.bundle, threads=args.threads, redis=url) as server:
            drawn = draw(server, args.requests)
            full = rig.run(lambda: server_round(server, args.concurrency, args.seconds, turn + 1))
            assert not full["wrong"]
    return {
        "store_p50_ms": statistics.median(stored),
        "picture_p50_ms": statistics.median(drawn),
        "picture_p90_ms": statistics.quantiles(drawn, n=10)[-1],
        "pictures_per_s": full["pictures_per_s"],
    }


async def store_jobs(url: str, count: int) -> dict[str, Any]:
    """Time the storing of jobs, one at a time."""
    times = []
    async with Queue.connect(url) as queue:
        for _ in range(count):
            start = time.perf_counter()
            await queue.enqueue([NewJob("emoji@1", "64x64", b"p" * 200, deadline_s=3600.0)], awaited=False)
            times.append((time.perf_counter() - start) * 1000)
    return {"ms": times}


def draw(server: rig.Server, count: int) -> list[float]:
    """Time requests from the first byte out to the last one in."""
    target = Target(f"{server.url}/v1")
    times = []
    with Wire(target.url) as wire:
        for picture in rig.different_pictures(WARM_UP + count):
            time.sleep(PAUSE_S)
            ms, status, _ = wire.post(target.body(Planned(0.0, picture, ANYBODY)))
            assert status == 200
            times.append(ms)
    return times[WARM_UP:]


if __name__ == "__main__":
    sys.exit(main())
