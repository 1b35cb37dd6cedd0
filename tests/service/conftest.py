"""A real server per test session, a fresh namespace per test, and a check that nothing is left behind.

TEST_SERVER=/path/to/redis-server runs the suite on another server binary.
"""

import asyncio
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from flashbulb_service.embedded import EmbeddedServer
from flashbulb_service.queue import Limits, Queue

LIVE = {"queued", "running", "delayed"}

MakeQueue = Callable[..., Queue]
CheckInvariants = Callable[[Queue], Awaitable[None]]


@pytest.fixture(scope="session")
def server_binary() -> Path | None:
    given = os.environ.get("TEST_SERVER")
    return Path(given) if given else None


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory, server_binary: Path | None) -> Iterator[str]:
    with EmbeddedServer(tmp_path_factory.mktemp("valkey"), binary=server_binary) as server:
        yield server.url


@pytest.fixture
def namespace() -> str:
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def check_invariants() -> CheckInvariants:
    """The queue's promises about its keys, read with plain commands and not with its scripts."""
    return assert_invariants


@pytest_asyncio.fixture
async def make_queue(redis_url: str, namespace: str) -> AsyncIterator[MakeQueue]:
    """Make queues on this test's namespace, each like a process of its own; closed and checked at the end."""
    made: list[Queue] = []

    def make(limits: Limits | None = None) -> Queue:
        made.append(Queue.connect(redis_url, namespace=namespace, limits=limits))
        return made[-1]

    yield make
    if made:
        await assert_invariants(made[0])
    for queue in made:
        await queue.aclose()


@pytest_asyncio.fixture
async def queue(make_queue: MakeQueue) -> Queue:
    return make_queue()


@pytest_asyncio.fixture
async def client(redis_url: str) -> AsyncIterator["Redis"]:
    """A plain client, to look from outside."""
    plain = Redis.from_url(redis_url)
    yield plain
    await plain.aclose()


async def wait_until(predicate: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Return as soon as the predicate holds; fail when it does not within timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not await predicate():
        assert time.monotonic() < deadline, f"still false after {timeout_s} s"
        await asyncio.sleep(0.005)


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[..., Awaitable[None]]:
    return wait_until


async def assert_invariants(queue: Queue) -> None:
    """Every id in exactly one place, counts equal to live jobs, a TTL or a living reason for every key."""
    db = queue._client
    tag = queue.keys.tag
    keys = sorted([key.decode() async for key in db.scan_iter(match=queue.keys.pattern(), count=1000)])
    ttl = {key: await db.pttl(key) for key in keys}
    jobs = {
        key.removeprefix(f"{tag}:job:"): {
            field.decode(): value.decode(errors="replace") for field, value in (await db.hgetall(key)).items()
        }
        for key in keys
        if key.startswith(f"{tag}:job:")
    }

    async def scores(key: str) -> dict[str, float]:
        return {member.decode(): score for member, score in await db.zrange(key, 0, -1, withscores=True)}

    def ids_in(state: str) -> set[str]:
        return {job_id for job_id, job in jobs.items() if job["state"] == state}

    queued = ids_in("queued")
    backlog = {jobs[job_id]["model"] for job_id in queued}
    expected: set[str] = set()  # keys that may live without TTL, with their exact content checked here

    assert set(await scores(f"{tag}:leases")) == ids_in("running")
    assert set(await scores(f"{tag}:delayed")) == ids_in("delayed")
    with_deadline = {j for j in queued | ids_in("delayed") if "deadline" in jobs[j]}
    assert set(await scores(f"{tag}:deadlines")) == with_deadline
    with_long = {jobs[j]["worker"] for j in ids_in("running") if jobs[j]["bucket"].endswith(":long")}
    assert set(await scores(f"{tag}:long")) == with_long
    expected |= {f"{tag}:leases", f"{tag}:delayed", f"{tag}:deadlines", f"{tag}:long"}

    for model in backlog:
        of_model = {job_id for job_id in queued if jobs[job_id]["model"] == model}
        waiting = await scores(f"{tag}:waiting:{model}")
        assert waiting == {job_id: float(jobs[job_id]["enqueued"]) for job_id in of_model}
        ready = {}
        for bucket in {jobs[job_id]["bucket"] for job_id in of_model}:
            due = {j: float(jobs[j]["due"]) for j in of_model if jobs[j]["bucket"] == bucket}
            assert await scores(f"{tag}:due:{model}:{bucket}") == due
            ready[bucket] = min(due.values())
            tenants = {jobs[job_id]["tenant"] for job_id in due}
            assert set(await scores(f"{tag}:t:{model}:{bucket}")) == tenants
            for tenant in tenants:
                key = f"{tag}:b:{model}:{bucket}:{tenant}"
                assert await scores(key) == {j: at for j, at in due.items() if jobs[j]["tenant"] == tenant}
                expected.add(key)
            expected |= {f"{tag}:due:{model}:{bucket}", f"{tag}:t:{model}:{bucket}"}
        assert await scores(f"{tag}:ready:{model}") == ready
        assert await db.llen(f"{tag}:wake:{model}") <= 1
        expected |= {f"{tag}:{name}:{model}" for name in ("waiting", "ready", "wake")}
    assert {model.decode() for model in await db.smembers(f"{tag}:models")} == backlog
    assert {model.decode() for model in await db.hkeys(f"{tag}:clock")} <= backlog
    expected |= {f"{tag}:models", f"{tag}:clock"}
    if backlog:  # the accounts last as long as anybody waits
        expected.add(f"{tag}:used")
    for lead in await scores(f"{tag}:hooks"):
        assert jobs[lead]["open"] == "0"
    assert await db.llen(f"{tag}:hooks:wake") <= 1
    expected |= {f"{tag}:hooks", f"{tag}:hooks:wake"}

    gates = {model.decode(): gate for model, gate in (await db.hgetall(f"{tag}:gates")).items()}
    for model in backlog:
        assert gates.get(model) != b"paused" or not await db.llen(f"{tag}:wake:{model}")
    keys_of_clients = [key.decode() for key in await db.zrange(f"{tag}:apikeys", 0, -1)]
    expected |= {
        f"{tag}:residence",
        f"{tag}:aliases",
        f"{tag}:gates",
        f"{tag}:apikeys",
        *(f"{tag}:apikey:{key}" for key in keys_of_clients),
    }

    live = [job for job in jobs.values() if job["state"] in LIVE]
    counts = Counter(job["tenant"] for job in live)
    if live:
        counts[""] = len(live)
    inuse = {tenant.decode(): int(count) for tenant, count in (await db.hgetall(f"{tag}:inuse")).items()}
    assert inuse == counts
    expected.add(f"{tag}:inuse")

    for job_id, job in jobs.items():
        assert (ttl[f"{tag}:job:{job_id}"] == -1) == (job["state"] in LIVE), f"{job_id} {job['state']}"
        expected.add(f"{tag}:job:{job_id}")
    for job_id in await scores(f"{tag}:dead"):
        assert jobs[job_id]["state"] == "failed"
        assert "payload" in jobs[job_id]

    leaked = [key for key in keys if ttl[key] == -1 and key not in expected]
    assert not leaked, f"keys without TTL and without a reason: {leaked}"
