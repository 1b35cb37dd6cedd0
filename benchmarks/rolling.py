"""A rolling restart under load, from one version to another on one Redis: does any request fail, is any job lost?

    python -m benchmarks rolling [--old REVISION] [--first workers apis] [--rate 10] [--write]

Two APIs and two workers of the old version serve pictures through a balancer that asks /readyz; then each of the four
is replaced in turn by one of the checkout's version, a new one up before an old one goes, while pictures are asked
for at times drawn beforehand (Poisson), some again under the idempotency key of an earlier one, and jobs are left in
the queue and read by whichever API comes. It is done once with the workers first and once with the APIs first. The
balancer never tries a request twice, so one refused connection would be one failed request. The verdict is good when
every request was answered with a picture, every job completed, one version drew one file for one seed, a replay was the
file of the first answer, and the pictures of the two versions agree within a rounding: two versions may run a graph
with other fusions, which moves last bits. How many differ, and by how much, is told.
"""

import asyncio
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import rig
from aiohttp import web
from PIL import Image

from flashbulb_service.embedded import EmbeddedServer

NAME = "rolling"
BEFORE = "5531879"  # the last revision of wire version 1
CHECK_S = 0.1  # how often the balancer asks /readyz
NOTICE_S = 0.5  # a stopping API says so this long before it takes no more connections
SETTLE_S = 2.0  # load on a stable set, before and after
SEEDS = 16
# Of a channel of 255 between versions. The demo student with all of onnxruntime's fusions and with none differs by at
# most 1 in 7 of 24 pictures; another seed by 250.
TOLERANCE = 2
READ_AGAIN_S = 1.0  # after a job was left, its state is read by the API whose turn it is
READY = re.compile(r"API on (http://\S+)")


@dataclass
class Part:
    """An API or a worker, as a process of one version."""

    kind: str
    process: subprocess.Popen[str]
    url: str = ""

    def stop(self) -> int:
        """Ask it to end as an orchestrator does, and wait."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(90)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code


@dataclass
class Balancer:
    """Passes requests on to the ready APIs by turns; never tries one twice."""

    http: aiohttp.ClientSession
    apis: list[str] = field(default_factory=list)
    ready: list[str] = field(default_factory=list)
    _turn: int = 0

    async def watch(self) -> None:
        """Keep `ready` at those that say they are."""
        while True:
            asked = list(self.apis)  # as it is now: one may come or go meanwhile
            told = await asyncio.gather(*(self._is_ready(url) for url in asked))
            self.ready = [url for url, ready in zip(asked, told, strict=True) if ready and url in self.apis]
            await asyncio.sleep(CHECK_S)

    async def forward(self, request: web.Request) -> web.Response:
        """Pass one request to the next ready API and its answer back."""
        if not self.ready:
            return web.Response(status=502, text="no API is ready")
        self._turn += 1
        url = self.ready[self._turn % len(self.ready)]
        headers = {name: request.headers[name] for name in ("Content-Type",) if name in request.headers}
        try:
            async with self.http.request(
                request.method, url + request.path_qs, data=await request.read(), headers=headers
            ) as answer:
                return web.Response(
                    status=answer.status, body=await answer.read(), content_type=answer.content_type
                )
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=f"{type(error).__name__}: {error}")

    async def _is_ready(self, url: str) -> bool:
        with suppress(aiohttp.ClientError, TimeoutError):
            async with self.http.get(url + "/readyz", timeout=aiohttp.ClientTimeout(total=1)) as answer:
                return answer.status == 200
        return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--old", default=BEFORE, help="revision that is running before")
    parser.add_argument(
        "--first",
        nargs="+",
        choices=("workers", "apis"),
        default=["workers", "apis"],
        help="what is replaced first; several: one run each",
    )
    parser.add_argument("--rate", type=float, default=10.0, help="pictures per second")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old = checkout(args.old, folder / "old")
        # What runs before serves its own bundle; it may not know one that was made later.
        own = old / "models" / args.bundle.parent.name / args.bundle.name
        models = rig.repository_of(folder / "models", own if own.is_dir() else args.bundle)
        runs = {}
        for first in args.first:
            rig.say(f"rolling: from {args.old} to this checkout, {first} first")
            place = folder / first
            place.mkdir()
            with EmbeddedServer(place / "queue") as server:
                settings = {
                    "redis": server.tcp_url,
                    "models": str(models),
                    "threads": str(args.threads),
                    "drain_notice_s": str(NOTICE_S),
                }
                runs[f"{first}_first"] = rig.run(
                    partial(roll, place, old, rig.ROOT, settings, args.rate, apis_first=first == "apis")
                )
    rig.finish(NAME, {"old": args.old, "rate": args.rate, **runs}, write=args.write)
    return 0 if all(run["verdict"]["good"] for run in runs.values()) else 1


def checkout(revision: str, folder: Path) -> Path:
    """Return a folder with the code and the bundles of a revision."""
    folder.mkdir()
    archive = subprocess.run(
        ["git", "archive", revision, "service", "distill", "kernels", "models"],
        cwd=rig.ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if archive.returncode:
        sys.exit(f"rolling: expected a revision, got {revision!r}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


def start(kind: str, code: Path, folder: Path, settings: dict[str, str]) -> Part:
    """Start an API or a worker of a version, each with a data folder of its own and one store of results."""
    log = (folder / f"{kind}-{time.monotonic_ns()}.log").open("w")
    environment = {
        **rig.clean_environment(code),
        **{f"FLASHBULB_{name.upper()}": value for name, value in settings.items()},
        "FLASHBULB_DATA": str(folder / "data"),
        "FLASHBULB_RESULTS_URL": (folder / "results").as_uri(),
    }
    arguments = ["--port", "0"] if kind == "api" else []
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flashbulb_service.cli", kind, *arguments],
            stderr=subprocess.PIPE if kind == "api" else log, text=True, env=environment,
        )  # fmt: skip
    part = Part(kind, process)
    if kind == "api":
        assert process.stderr is not None
        for line in process.stderr:
            if found := READY.search(line):
                part.url = found[1]
                break
        else:
            sys.exit("rolling: an API ended before it listened")
        rig.drain(process.stderr)
    return part


async def roll(
    folder: Path, old: Path, new: Path, settings: dict[str, str], rate: float, *, apis_first: bool = False
) -> dict[str, Any]:
    """Serve with the old version, replace everything, and count what clients saw."""
    (folder / "results").mkdir()
    parts = [start("worker", old, folder, settings) for _ in range(2)]
    parts += [start("api", old, folder, settings) for _ in range(2)]
    started = list(parts)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
        AsyncExitStack() as cleanup,
    ):
        balancer = Balancer(http, [part.url for part in parts if part.url])
        watching = asyncio.create_task(balancer.watch())
        runner, address = await listen(balancer)
        load = Load(http, address, rate)
        try:
            await until_workers(http, balancer, 2)
            load.old = await load.draw_each()
            running = asyncio.create_task(load.run())
            cleanup.callback(running.cancel)
            await asyncio.sleep(SETTLE_S)
            load.phase = "rolling"
            for index, part in sorted(
                enumerate(list(parts)), key=lambda one: (one[1].kind == "api") != apis_first
            ):
                parts[index] = await asyncio.to_thread(start, part.kind, new, folder, settings)
                started.append(parts[index])
                if part.kind == "worker":
                    await until_workers(http, balancer, 3)
                else:
                    balancer.apis.append(parts[index].url)
                    await until("a new API is ready", lambda url=parts[index].url: url in balancer.ready)  # type: ignore[misc]
                code = await asyncio.to_thread(part.stop)
                load.exits.append(code)
                if part.url:
                    balancer.apis.remove(part.url)
                else:
                    await until_workers(http, balancer, 2)
            load.phase = "after"
            load.new = await load.draw_each()
            await asyncio.sleep(SETTLE_S)
            load.stop.set()
            await running
            return await load.result()
        finally:
            watching.cancel()
            await runner.cleanup()
            for part in started:
                if part.process.poll() is None:
                    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                        await asyncio.to_thread(part.stop)


async def listen(balancer: Balancer) -> tuple[web.AppRunner, str]:
    """Serve the balancer on a free port of loopback."""
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", balancer.forward)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    return runner, f"http://{host}:{port}"


async def until_workers(http: aiohttp.ClientSession, balancer: Balancer, count: int) -> None:
    """Wait until an API counts so many live workers."""

    async def counted() -> bool:
        if not balancer.ready:
            return False
        with suppress(aiohttp.ClientError):
            async with http.get(balancer.ready[0] + "/readyz") as answer:
                return bool((await answer.json()).get("workers") == count)
        return False

    await until(f"{count} live workers", counted)


async def until(what: str, condition: Any, timeout_s: float = 60.0) -> None:
    """Wait for a condition, plain or awaitable."""
    deadline = time.monotonic() + timeout_s
    while True:
        told = condition()
        if await told if asyncio.iscoroutine(told) else told:
            return
        if time.monotonic() > deadline:
            sys.exit(f"rolling: {what}: not within {timeout_s:g} s")
        await asyncio.sleep(CHECK_S)


@dataclass(frozen=True)
class Drawn:
    """A picture that a client got, and the phase of the restart when it was asked for and when it came."""

    seed: int
    file: bytes
    keyed: bool = False
    asked: str = "rolling"
    came: str = "rolling"


def judge_pictures(
    drawn: Sequence[Drawn], old: Mapping[int, bytes], new: Mapping[int, bytes]
) -> tuple[dict[str, bool], dict[str, Any]]:
    """Compare what clients got with the files that each version alone drew: -> verdict, differences of the versions.

    Args:
        drawn: what clients got; a keyed one is a replay, by whichever version, of the first of its seed.
        old, new: seed -> file.
    """
    first: dict[int, bytes] = {}
    replays = [first.setdefault(one.seed, one.file) == one.file for one in drawn if one.keyed]
    own = [one.file in _possible(one, old, new) for one in drawn]
    apart = [_difference(old[seed], new[seed]) for seed in sorted(old.keys() & new.keys())]
    verdict = {
        "one_file_per_version": all(own),
        "replays_equal": all(replays),
        "versions_agree": bool(apart) and max(apart) <= TOLERANCE,
    }
    return verdict, {
        "pictures": len(apart),
        "differ": sum(largest > 0 for largest in apart),
        "largest_of_255": max(apart, default=None),
    }


def _possible(one: Drawn, old: Mapping[int, bytes], new: Mapping[int, bytes]) -> set[bytes | None]:
    """Return the files that a picture may be: of the one version in service, of either while they are mixed."""
    if one.came == "before":
        return {old.get(one.seed)}
    if one.asked == "after" and not one.keyed:
        return {new.get(one.seed)}
    return {old.get(one.seed), new.get(one.seed)}


def _difference(a: bytes, b: bytes) -> int:
    """Return the largest difference of a channel between two files, of 255."""
    with Image.open(BytesIO(a)) as left, Image.open(BytesIO(b)) as right:
        pixels = [np.asarray(picture.convert("RGBA"), dtype=np.int16) for picture in (left, right)]
    return 255 if pixels[0].shape != pixels[1].shape else int(np.abs(pixels[0] - pixels[1]).max())


class Load:
    """Pictures at drawn times, and a job beside every fourth one that nobody waits for."""

    def __init__(self, http: aiohttp.ClientSession, address: str, rate: float) -> None:
        self.phase = "before"
        self.stop = asyncio.Event()
        self.exits: list[int] = []
        self.old: dict[int, bytes] = {}  # what each version draws alone: seed -> file
        self.new: dict[int, bytes] = {}
        self._http, self._address, self._rate = http, address, rate
        self._answers: Counter[str] = Counter()
        self._times: dict[str, list[float]] = {}
        self._drawn: list[Drawn] = []
        self._jobs: list[str] = []

    async def run(self) -> None:
        """Send until told to stop, then wait for every answer."""
        draws = random.Random(0)
        sent: list[asyncio.Task[Any]] = []
        try:
            while not self.stop.is_set():
                seed = len(sent) % SEEDS
                sent.append(asyncio.create_task(self._picture(seed, keyed=len(sent) % 3 == 0)))
                if len(sent) % 4 == 0:
                    sent.append(asyncio.create_task(self._job(seed)))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.stop.wait(), draws.expovariate(self._rate))
            await asyncio.gather(*sent)
        finally:
            for task in sent:
                task.cancel()

    async def draw_each(self) -> dict[int, bytes]:
        """Draw every seed once, by the version in service: -> seed -> file."""
        files = [await self._picture(seed, keyed=False) for seed in range(SEEDS)]
        return {seed: file for seed, file in enumerate(files) if file is not None}

    async def result(self) -> dict[str, Any]:
        """Wait for the jobs, and sum up."""
        states = Counter([await self._ended(job) for job in self._jobs])
        pictures, versions = judge_pictures(self._drawn, self.old, self.new)
        verdict = {
            "no_request_failed": set(self._answers) == {"200"},
            "no_job_lost": set(states) == {"completed"},
            **pictures,
            "clean_exits": set(self.exits) == {0},
        }
        return {
            "verdict": {"good": all(verdict.values()), **verdict},
            "answers": dict(self._answers),
            "jobs": dict(states),
            "versions": versions,
            "latency_ms": {
                phase: {"p50": round(statistics.median(times), 1), "max": round(max(times), 1)}
                for phase, times in self._times.items()
            },
        }

    async def _picture(self, seed: int, *, keyed: bool) -> bytes | None:
        body: dict[str, Any] = {"prompt": "red apple", "seed": seed}
        if keyed:  # the first of a seed is drawn, the others are its replays by either version
            body["idempotency_key"] = f"seed {seed}"
        started, phase = time.monotonic(), self.phase
        try:
            async with self._http.post(self._address + "/v1/images/generations", json=body) as answer:
                data = await answer.json(content_type=None) if answer.status == 200 else await answer.text()
                self._answers[str(answer.status)] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self._answers[type(error).__name__] += 1
            return None
        if isinstance(data, str):
            print(f"rolling: {answer.status} {data[:200]}", file=sys.stderr)
            return None
        self._times.setdefault(phase, []).append((time.monotonic() - started) * 1000)
        file = b64decode(data["data"][0]["b64_json"])
        self._drawn.append(Drawn(seed, file, keyed, asked=phase, came=self.phase))
        return file

    async def _job(self, seed: int) -> None:
        body = {"task": "text-to-image", "prompt": "rocket", "seed": seed}
        async with self._http.post(self._address + "/v1/jobs", json=body) as answer:
            text = await answer.text()
            if answer.status >= 300:
                print(f"rolling: {answer.status} {text[:200]}", file=sys.stderr)
                self._answers[f"job {answer.status}"] += 1
                return
            job = (await answer.json())["id"]
        self._jobs.append(job)
        await asyncio.sleep(READ_AGAIN_S)
        async with self._http.get(f"{self._address}/v1/jobs/{job}") as answer:
            if answer.status != 200:
                print(f"rolling: {answer.status} {(await answer.text())[:200]}", file=sys.stderr)
            self._answers[str(answer.status)] += 1

    async def _ended(self, job: str) -> str:
        state = ""

        async def over() -> bool:
            nonlocal state
            async with self._http.get(f"{self._address}/v1/jobs/{job}") as answer:
                state = str((await answer.json(content_type=None)).get("status", answer.status))
            return state not in {"queued", "in_progress"}

        await until(f"the end of {job}", over)
        return state


if __name__ == "__main__":
    sys.exit(main())
