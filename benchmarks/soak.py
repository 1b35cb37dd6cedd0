"""The whole server under random requests, cancels and disconnects: does its memory stay flat, is nothing left over?

    python -m benchmarks soak [--minutes 20] [--clients 12] [--seed 0] [--write]

Clients draw pictures, leave in the middle, send what cannot be served, and cancel jobs where the server has
/v1/jobs. Results live for 30 s here and few prompts are remembered, so that what is kept on purpose reaches its level
in the warm-up, the first quarter of the time. Anonymous memory (what no file holds) of API, worker and Valkey is read
every 5 s; the growth of a part is the median of its last fifth after warm-up over the median of the first fifth. The
verdict is good when every part grew by less than 2 %, none was started again, every answer was one that was asked
for, the queue is empty at the end, and no key without TTL is left.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import redis
import rig

from flashbulb_service.bench.validity import UnreadableAnswer, draw_of, read_pictures

NAME = "soak"
SAMPLE_S = 5.0
MAX_GROWTH = 0.02
RESULTS_TTL_S = 30
EMBEDDING_CACHE_MB = 4
WRONG_BODIES: tuple[dict[str, Any], ...] = (
    {"prompt": ""},
    {"prompt": "dog", "n": 0},
    {"prompt": "dog", "size": "7x7"},
    {"prompt": "dog", "no_such_field": 1},
    {"prompt": "dog", "model": "no-such-model"},
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    kept = {"results_ttl_s": str(RESULTS_TTL_S), "embedding_cache_mb": str(EMBEDDING_CACHE_MB)}
    with rig.serving(args.bundle, threads=args.threads, **kept) as server:
        result = rig.run(lambda: soak(server, args.minutes * 60, args.clients, args.seed))
    rig.finish(NAME, result, write=args.write)
    return 0 if result["verdict"]["good"] else 1


async def soak(server: rig.Server, seconds: float, clients: int, seed: int) -> dict[str, Any]:
    """Run the clients, watch the memory, then wait until the server is idle and look at what is left."""
    outcomes: Counter[str] = Counter()
    memory: list[dict[str, float]] = []
    begin = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(server.url, timeout=timeout) as http:
        has_jobs = await offers_jobs(http)
        parts = server.pids()
        watching = asyncio.create_task(watch(parts, memory, begin))
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(clients):
                    rng = random.Random(f"{seed} {number}")
                    group.create_task(be_a_client(http, rng, begin + seconds, outcomes, has_jobs=has_jobs))
            lived = not watching.done() and server.pids() == parts
            if watching.done():
                rig.say(f"memory could no longer be read: {watching.exception()!r}")
        finally:
            watching.cancel()
    left = await asyncio.to_thread(leftovers, server.queue_url(), 60.0)
    growth = growth_by_part(memory, seconds)
    bad = {name: count for name, count in outcomes.items() if name.startswith("unexpected")}
    verdict = {
        "memory_flat": bool(growth) and all(value < MAX_GROWTH for value in growth.values()),
        "parts_lived": lived,
        "queue_empty": left["live_jobs"] == 0,
        "no_keys_left": not left["keys_without_ttl"],
        "answers_expected": not bad and outcomes["drawn"] > 0,
    }
    return {
        "verdict": {"good": all(verdict.values()), **verdict},
        "growth": {part: round(value, 5) for part, value in growth.items()},
        "seconds": seconds,
        "clients": clients,
        "seed": seed,
        "jobs_route": has_jobs,
        "outcomes": dict(outcomes.most_common()),
        "left": left,
        "memory_mb": memory,
    }


async def be_a_client(
    http: aiohttp.ClientSession,
    rng: random.Random,
    until: float,
    outcomes: Counter[str],
    *,
    has_jobs: bool,
) -> None:
    """Do one thing after another, with pauses, until the time is over."""
    while time.monotonic() < until:
        lot = rng.random()
        try:
            if lot < 0.15:
                outcomes[await leave(http, rng)] += 1
            elif lot < 0.2:
                outcomes[await send_wrong(http, rng)] += 1
            elif lot < 0.35 and has_jobs:
                outcomes[await cancel_job(http, rng)] += 1
            else:
                outcomes[await draw(http, rng)] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            outcomes[f"unexpected {type(error).__name__}"] += 1
        await asyncio.sleep(rng.expovariate(1 / 0.1))


def some_request(rng: random.Random) -> dict[str, Any]:
    """Draw a request that can be served."""
    return {
        "prompt": f"{rng.choice(('red', 'blue'))} {rng.choice(('dog', 'apple'))} {rng.randrange(10**6)}",
        "n": rng.choice((1, 1, 1, 2, 4)),
        "seed": rng.randrange(2**31),
        "output_format": rng.choice(("png", "png", "jpeg", "webp")),
    }


async def draw(http: aiohttp.ClientSession, rng: random.Random) -> str:
    """Ask for pictures and look at them."""
    body = some_request(rng)
    async with http.post("/v1/images/generations", json=body) as answer:
        content = await answer.read()
        if answer.status == 429:
            return "refused 429"
        if answer.status != 200:
            return f"unexpected status {answer.status}"
    try:
        found = draw_of(read_pictures(content))
    except UnreadableAnswer:
        return "unexpected answer without pictures"
    return "drawn" if len(found.files) == body["n"] else "unexpected number of pictures"


async def leave(http: aiohttp.ClientSession, rng: random.Random) -> str:
    """Close the connection while the server works."""
    asking = asyncio.create_task(draw(http, rng))
    await asyncio.wait({asking}, timeout=rng.expovariate(1 / 0.03))
    if not asking.cancel():
        return asking.result()
    await asyncio.gather(asking, return_exceptions=True)
    return "left"


async def send_wrong(http: aiohttp.ClientSession, rng: random.Random) -> str:
    """Send what must be refused."""
    async with http.post("/v1/images/generations", json=rng.choice(WRONG_BODIES)) as answer:
        await answer.read()
        return (
            "refused as wrong" if answer.status in (400, 404, 422) else f"unexpected status {answer.status}"
        )


async def cancel_job(http: aiohttp.ClientSession, rng: random.Random) -> str:
    """Queue a job and cancel it a moment later."""
    async with http.post("/v1/jobs", json=some_request(rng)) as answer:
        told = await answer.json()
        if answer.status == 429:
            return "refused 429"
        if answer.status not in (200, 201, 202):
            return f"unexpected status {answer.status} of a new job"
    await asyncio.sleep(rng.expovariate(1 / 0.02))
    async with http.delete(f"/v1/jobs/{told['id']}") as answer:
        await answer.read()
        return (
            "cancelled" if answer.status in (200, 204) else f"unexpected status {answer.status} of a cancel"
        )


async def offers_jobs(http: aiohttp.ClientSession) -> bool:
    """Tell whether the server has a route for jobs."""
    async with http.get("/openapi.json") as answer:
        document = json.loads(await answer.read())
    return "/v1/jobs" in document["paths"]


async def watch(parts: Mapping[str, int], memory: list[dict[str, float]], begin: float) -> None:
    """Write down the memory of the server's parts from time to time; raise when one has ended."""
    while True:
        used = {part: round(rig.anonymous_mb(pid), 3) for part, pid in parts.items()}
        memory.append({"at_s": round(time.monotonic() - begin, 1), **used})
        await asyncio.sleep(SAMPLE_S)


def growth_by_part(memory: Sequence[dict[str, float]], seconds: float) -> dict[str, float]:
    """Compare the ends of what was measured after the warm-up; empty when that is too little."""
    after = [row for row in memory if row["at_s"] >= seconds / 4]
    share = len(after) // 5
    if share == 0:
        return {}
    return {
        part: statistics.median(row[part] for row in after[-share:])
        / statistics.median(row[part] for row in after[:share])
        - 1
        for part in after[0]
        if part != "at_s"
    }


def leftovers(url: str, timeout_s: float) -> dict[str, Any]:
    """Wait until no job lives, then list the keys that would stay for ever."""
    client = redis.Redis.from_url(url)
    until = time.monotonic() + timeout_s
    while True:
        keys = sorted(key.decode() for key in client.scan_iter(count=1000))
        live = sum(int(client.zcard(key)) for key in keys if key.endswith((":leases", ":delayed")))  # type: ignore[arg-type]
        live += sum(int(client.zcard(key)) for key in keys if ":waiting:" in key)  # type: ignore[arg-type]
        if live == 0 or time.monotonic() > until:
            break
        time.sleep(0.2)
    forever = [key for key in keys if client.ttl(key) == -1]
    client.close()
    return {"live_jobs": live, "keys": len(keys), "keys_without_ttl": forever[:100]}


if __name__ == "__main__":
    sys.exit(main())
