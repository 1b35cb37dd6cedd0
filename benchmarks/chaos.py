"""Workers, APIs and Valkey are killed at random under load (SIGKILL): is a job lost, done twice, drawn differently?

    python -m benchmarks chaos [--jobs 2000] [--kills 33] [--seed 1] [--write]

Two APIs and two workers (on the synthetic device) share one Valkey. Clients queue jobs over HTTP, each with an
idempotency key, and ask again wherever an answer is missing, as a client must. A third of the kills each hits a
worker, an API, and Valkey, in random order, each time another random number of pictures was stored; everything is
started again on the same data. Then the same jobs run once more, calm. The verdict is good when every job completed,
every one has exactly one event that ends it, no more jobs exist than were asked for, nothing is left in the queue, and
every picture has the bytes of the calm run.
"""

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import aiohttp
import redis
import rig
from peers import free_port
from soak import leftovers

from flashbulb_service.embedded import EmbeddedServer

NAME = "chaos"
KINDS = ("worker", "api", "valkey")
CLIENTS = 16
RETRY_S = 0.1
POLL_S = 0.02
BACK_S = 60.0  # until what was started is at work
STALLED_S = 90.0  # without progress for so long, something is lost
DEVICE = {"floor_ms": 20, "base_ms": 20, "row_ms": 20}
ENDS = {"done", "failed", "cancelled"}


@dataclass
class Fleet:
    """Two APIs at fixed ports, two workers, and the Valkey that its supervisor keeps running."""

    folder: Path
    server: EmbeddedServer
    environment: dict[str, str]
    ports: tuple[int, int]
    apis: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    workers: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start(self) -> None:
        """Start whatever does not run."""
        for port in self.ports:
            if port not in self.apis:
                self.apis[port] = self._run("api", "--port", str(port))
        while len(self.workers) < 2:
            self.workers.append(self._run("worker"))

    def kill(self, kind: str, draws: random.Random) -> bool:
        """Kill one process of a kind when it is at work, and start it again; tell whether it was hit there."""
        if kind == "valkey":
            if not within_time(self._valkey_answers) or (victim := self.server.pid) is None:
                return False
            os.kill(victim, signal.SIGKILL)
            within_time(lambda: self.server.pid != victim)  # or the next kill might hit this one again
            return True
        if kind == "api":
            port = draws.choice(self.ports)
            process, is_at_work = self.apis[port], partial(answers, port)
        else:
            process = draws.choice(self.workers)
            is_at_work = partial(is_present, self.server.url, process.pid)
        is_hit = within_time(lambda: process.poll() is not None or is_at_work()) and process.poll() is None
        process.kill()
        process.wait()
        self.apis = {port: api for port, api in self.apis.items() if api is not process}
        self.workers = [worker for worker in self.workers if worker is not process]
        self.start()
        return is_hit

    def _valkey_answers(self) -> bool:
        """Tell whether it is the process of now that answers; at first that is not Valkey yet."""
        pid = self.server.pid
        return pid is not None and pid == answering_pid(self.server.url)

    def stop(self) -> None:
        """End everything but Valkey."""
        for process in (*self.apis.values(), *self.workers):
            process.kill()
            process.wait()

    def stored(self) -> int:
        """Return how many pictures there are."""
        folder = self.folder / "results"
        return sum(1 for _ in folder.glob("*.png")) if folder.is_dir() else 0

    def _run(self, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{arguments[0]}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flashbulb_service.cli", *arguments],
                stdout=log,
                stderr=log,
                env=self.environment,
            )


def within_time(condition: Callable[[], bool]) -> bool:
    """Wait, but not for ever, until a condition holds; tell whether it does."""
    until = time.monotonic() + BACK_S
    while not (holds := condition()) and time.monotonic() < until:
        time.sleep(POLL_S)
    return holds


def answering_pid(url: str) -> int | None:
    """Return the process that answers at Valkey's address, if one serves there."""
    with suppress(redis.RedisError), redis.Redis.from_url(url) as client:
        client.ping()
        told: Any = client.info("server")
        return int(told["process_id"])
    return None


def answers(port: int) -> bool:
    """Tell whether an API answers."""
    with suppress(OSError), closing(HTTPConnection("127.0.0.1", port, timeout=5)) as api:
        api.request("GET", "/livez")
        return api.getresponse().status == 200
    return False


def is_present(url: str, pid: int) -> bool:
    """Tell whether the worker of a process has said that it lives."""
    with suppress(redis.RedisError), redis.Redis.from_url(url) as client:
        lists: list[Any] = [client.zrange(key, 0, -1) for key in client.scan_iter(match="*:workers")]
        return any(f"-{pid}-".encode() in worker for workers in lists for worker in workers)
    return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=33)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    rig.say(f"{args.jobs} jobs with {args.kills} kills")
    with fleet(args.bundle, args.threads) as one:
        rough = rig.run(
            lambda: drive(one, args.jobs, plan_kills(args.jobs, args.kills, args.seed), args.seed)
        )
        left = leftovers(one.server.url, 30.0)
    rig.say("the same jobs, calm")
    with fleet(args.bundle, args.threads) as one:
        calm = rig.run(lambda: drive(one, args.jobs, [], args.seed))
    verdict, different = judge(rough, calm, left, args.jobs, args.kills)
    result = {
        "verdict": {"good": all(verdict.values()), **verdict},
        "jobs": args.jobs,
        "seed": args.seed,
        "different": different[:20],
        "left": left,
        **{
            name: {key: value for key, value in run.items() if key != "digests"}
            for name, run in (("chaos", rough), ("calm", calm))
        },
    }
    rig.finish(NAME, result, write=args.write)
    return 0 if result["verdict"]["good"] else 1


def judge(
    rough: dict[str, Any], calm: dict[str, Any], left: dict[str, Any], num_jobs: int, num_kills: int
) -> tuple[dict[str, bool], list[int]]:
    """Decide by both runs and what is left in the queue; also return the jobs with other bytes."""
    different = [
        number for number, digest in calm["digests"].items() if rough["digests"].get(number) != digest
    ]
    verdict = {
        "killed_as_planned": sum(rough["kills"].values()) == num_kills,
        "none_lost": rough["states"] == {"completed": num_jobs} == calm["states"],
        "none_double": rough["jobs_stored"] == num_jobs and rough["ends"] == {1: num_jobs},
        "equal_bytes": not different and len(calm["digests"]) == num_jobs,
        "queue_empty": left["live_jobs"] == 0 and not left["keys_without_ttl"],
    }
    return verdict, different


def plan_kills(num_jobs: int, num_kills: int, seed: int) -> list[tuple[int, str]]:
    """Draw when and what to kill: (pictures stored by then, kind), each kind equally often."""
    draws = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(num_kills)]
    draws.shuffle(kinds)
    return list(zip(sorted(draws.choices(range(1, num_jobs * 9 // 10), k=num_kills)), kinds, strict=True))


@contextmanager
def fleet(bundle: Path, threads: int) -> Iterator[Fleet]:
    """Run everything in a folder of its own while this is open."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with EmbeddedServer(folder / "queue") as server:
            settings = {
                "redis": server.url,
                "models": str(bundle.resolve().parent.parent),
                "data": name,
                "threads": str(threads),
                "backend": "synthetic",
                "synthetic": json.dumps(DEVICE),
                "max_batch": "4",
                "lease_s": "2",
                "slo_s": "3600",
            }
            environment = rig.clean_environment() | {
                f"FLASHBULB_{key.upper()}": text for key, text in settings.items()
            }
            one = Fleet(folder, server, environment, (free_port(), free_port()))
            try:
                one.start()
                yield one
            finally:
                one.stop()


async def drive(one: Fleet, num_jobs: int, kills: Sequence[tuple[int, str]], seed: int) -> dict[str, Any]:
    """Queue the jobs, kill as planned, and look at every job's end."""
    begin = time.monotonic()
    killed: Counter[str] = Counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
        clients = Clients(http, one.ports, seed)
        queueing = asyncio.create_task(clients.each(num_jobs, clients.queue))
        draws = random.Random(seed)
        for stored, kind in kills:
            await reached(one, lambda stored=stored: one.stored() >= stored)
            killed[kind] += await asyncio.to_thread(one.kill, kind, draws)
        ids: list[str] = await queueing
        await reached(one, lambda: one.stored() >= num_jobs)
        ended = await clients.each(num_jobs, lambda number: clients.end_of(ids[number]))
    return {
        "kills": dict(killed),
        "seconds": round(time.monotonic() - begin, 1),
        "states": dict(Counter(state for state, _, _ in ended)),
        "ends": dict(Counter(ends for _, ends, _ in ended)),
        "jobs_stored": await asyncio.to_thread(count_jobs, one.server.url),
        "asked_again": dict(clients.asked_again),
        "digests": {number: digest for number, (_, _, digest) in enumerate(ended)},
    }


async def reached(one: Fleet, condition: Callable[[], bool]) -> None:
    """Wait for a condition while pictures appear; where none does for long, go on: the verdict will tell."""
    most, since = one.stored(), time.monotonic()
    while not condition():
        if one.stored() > most:
            most, since = one.stored(), time.monotonic()
        if time.monotonic() - since > STALLED_S:
            rig.say(f"no progress for {STALLED_S:.0f} s at {most} pictures")
            return
        await asyncio.sleep(POLL_S)


def count_jobs(url: str) -> int:
    """Return how many jobs Valkey holds, ended ones too."""
    with redis.Redis.from_url(url) as client:
        return sum(1 for _ in client.scan_iter(match="*:job:*", count=1000))


class Clients:
    """What correct clients do: name a request, and ask again until there is an answer."""

    def __init__(self, http: aiohttp.ClientSession, ports: Sequence[int], seed: int) -> None:
        self.asked_again: Counter[str] = Counter()
        self._http, self._ports, self._draws = http, ports, random.Random(seed)

    async def each(self, count: int, work: Callable[[int], Any]) -> list[Any]:
        """Do some work for each number, by a bounded number of clients at once."""
        free = asyncio.Semaphore(CLIENTS)

        async def one(number: int) -> Any:
            async with free:
                return await work(number)

        return await asyncio.gather(*(one(number) for number in range(count)))

    async def queue(self, number: int) -> str:
        """Queue a job; return its id once that is acknowledged."""
        body = {"prompt": f"red apple {number}", "seed": number}
        told = await self._ask("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": f"chaos-{number}"})
        return str(json.loads(told)["id"])

    async def end_of(self, job_id: str) -> tuple[str, int, str]:
        """Return a job's state, how many events ended it, and the hash of its picture."""
        until = time.monotonic() + STALLED_S
        while True:
            job = json.loads(await self._ask("GET", f"/v1/jobs/{job_id}"))
            if job["status"] not in ("queued", "in_progress") or time.monotonic() > until:
                break
            await asyncio.sleep(RETRY_S)
        if job["status"] != "completed":
            return str(job["status"]), 0, ""
        stream = (await self._ask("GET", f"/v1/jobs/{job_id}/events")).decode()
        kinds = [
            line.removeprefix("event: picture.") for line in stream.splitlines() if line.startswith("event: ")
        ]
        name = job["data"][0]["url"].rpartition("/")[2]
        picture = await self._ask("GET", f"/v1/images/results/{name}")
        return "completed", sum(kind in ENDS for kind in kinds), hashlib.sha256(picture).hexdigest()

    async def _ask(self, method: str, path: str, **options: Any) -> bytes:
        while True:
            address = f"http://127.0.0.1:{self._draws.choice(self._ports)}{path}"
            with suppress(aiohttp.ClientError, TimeoutError, ConnectionError):
                async with self._http.request(method, address, **options) as answer:
                    content = await answer.read()
                    if answer.status < 300:
                        return content
                    if answer.status < 500 and answer.status != 429:
                        raise SystemExit(f"chaos: {method} {path}: {answer.status} {content[:300]!r}")
                    self.asked_again[str(answer.status)] += 1
                    await asyncio.sleep(RETRY_S)
                    continue
            self.asked_again["no answer"] += 1
            await asyncio.sleep(RETRY_S)


if __name__ == "__main__":
    sys.exit(main())
