"""Which workers are alive, and which models they serve. One sorted set, scored by the time each entry ends.

All times are the Redis server's, so that machines with different clocks agree.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Self, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.wire import WIRE

TTL_S = 6.0
INTERVAL_S = 1.5
CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
MAX_METRICS_BYTES = 256 * 1024
MAX_METRICS_WORKERS = 256


@dataclass(frozen=True)
class LiveWorker:
    """A worker that said so within the last seconds."""

    id: str
    models: tuple[str, ...]  # name@version
    backend: str  # as it was asked for
    bundles: tuple[str, ...] = ()  # sha256 of each model's manifest, in their order
    backends: tuple[str, ...] = ()  # what runs each model, in their order
    wire: int = WIRE  # the version of what it reads and writes
    paused: tuple[str, ...] = ()  # those of the models that it leaves to others for a while: a load failed


class Presence:
    """The list of live workers of one namespace."""

    def __init__(self, client: Redis, *, namespace: str) -> None:
        """Use an open client; see `connect`."""
        self._client = client
        self._prefix = f"{{{namespace}}}"
        self._key = f"{self._prefix}:workers"
        self.clock_offset_s = 0.0  # the server's clock less ours, as the last announcement found it

    @classmethod
    def connect(cls, url: str, *, namespace: str) -> Self:
        """Make the list on `redis://host:port/db` or `unix:///path`; connects lazily."""
        # Bounded by asyncio.timeout, not by redis-py's socket timeout: see Queue.connect.
        client = Redis.from_url(url, socket_timeout=None, socket_connect_timeout=CONNECT_TIMEOUT_S)
        return cls(client, namespace=namespace)

    async def announce(
        self,
        worker: LiveWorker,
        ttl_s: float = TTL_S,
        *,
        metrics: bytes = b"",
        memory: Mapping[str, int] | None = None,
        instead_of: LiveWorker | None = None,
    ) -> None:
        """Say that a worker is alive for the next `ttl_s` seconds, what it has counted, and what lies in its memory.

        memory: model -> bytes, 0 for one that is not loaded now.
        instead_of: what it said before, which ends at once, with no moment between in which it is not on the list.

        Raises:
            QueueUnavailable: the server does not answer.
        """
        async with _answering():
            now = await self._now()
            self.clock_offset_s = now - time.time()
            async with self._client.pipeline() as pipe:
                if 0 < len(metrics) <= MAX_METRICS_BYTES:
                    pipe.set(self._metrics_key(worker), metrics, px=max(1, round(ttl_s * 1000)))
                if memory is not None:
                    text = json.dumps(dict(memory))
                    pipe.set(self._memory_key(worker), text, px=max(1, round(ttl_s * 1000)))
                if instead_of is not None and instead_of != worker:
                    pipe.zrem(self._key, _to_member(instead_of))
                pipe.zadd(self._key, {_to_member(worker): now + ttl_s})
                pipe.zremrangebyscore(self._key, "-inf", now)
                pipe.expire(self._key, 3600)
                await pipe.execute()

    async def withdraw(self, worker: LiveWorker) -> None:
        """Take a worker off the list.

        Raises:
            QueueUnavailable: the server does not answer.
        """
        async with _answering():
            await self._client.zrem(self._key, _to_member(worker))

    async def workers(self) -> list[LiveWorker]:
        """List the live workers.

        Raises:
            QueueUnavailable: the server does not answer.
        """
        async with _answering():
            members = await self._client.zrangebyscore(self._key, await self._now(), "+inf")
        return [_from_member(cast(bytes, member)) for member in members]

    async def metrics(self, workers: Sequence[LiveWorker]) -> dict[str, bytes]:
        """Return what workers have counted, by worker id; at most `MAX_METRICS_WORKERS` of them are asked.

        Raises:
            QueueUnavailable: the server does not answer.
        """
        asked = workers[:MAX_METRICS_WORKERS]
        if not asked:
            return {}
        async with _answering():
            found = await self._client.mget([self._metrics_key(worker) for worker in asked])
        pairs = zip(asked, found, strict=True)
        return {worker.id: cast(bytes, data) for worker, data in pairs if data is not None}

    async def memory(self, workers: Sequence[LiveWorker]) -> dict[str, dict[str, int]]:
        """Return worker -> model -> bytes in its memory, of at most `MAX_METRICS_WORKERS` workers.

        Raises:
            QueueUnavailable: the server does not answer.
        """
        asked = workers[:MAX_METRICS_WORKERS]
        if not asked:
            return {}
        async with _answering():
            found = await self._client.mget([self._memory_key(worker) for worker in asked])
        pairs = zip(asked, found, strict=True)
        return {worker.id: json.loads(cast(bytes, data)) for worker, data in pairs if data is not None}

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _memory_key(self, worker: LiveWorker) -> str:
        return f"{self._prefix}:memory:{worker.id}"

    def _metrics_key(self, worker: LiveWorker) -> str:
        return f"{self._prefix}:metrics:{worker.id}"

    async def _now(self) -> float:
        seconds, micros = await self._client.time()
        return int(seconds) + int(micros) / 1e6


def serves(workers: Sequence[LiveWorker], model: str, bundle: str | None = None) -> bool:
    """Tell whether a live worker serves the model (name@version), and if given, from this very bundle (sha256)."""
    if bundle is None:
        return any(model in worker.models for worker in workers)
    return any((model, bundle) in zip(worker.models, worker.bundles, strict=False) for worker in workers)


def would_serve(workers: Sequence[LiveWorker], model: str, bundle: str) -> bool:
    """Tell whether a bundle is served, or would be by the worker that its waiting work starts.

    While a live worker has another bundle of the name, that one is what a worker has ready.
    """
    name = model.partition("@")[0]
    names = {served.partition("@")[0] for worker in workers for served in worker.models}
    return serves(workers, model, bundle) or name not in names


def _to_member(worker: LiveWorker) -> str:
    return json.dumps(asdict(worker), sort_keys=True)


def _from_member(member: bytes) -> LiveWorker:
    fields = json.loads(member)
    bundles, backends = (tuple(fields.get(name, ())) for name in ("bundles", "backends"))
    wire, paused = fields.get("wire", 1), tuple(fields.get("paused", ()))
    return LiveWorker(
        fields["id"], tuple(fields["models"]), fields["backend"], bundles, backends, wire, paused
    )


def backends_of(workers: Sequence[LiveWorker], model: str) -> list[str]:
    """Return the backends that run a model (name@version) now, sorted."""
    chosen = [dict(zip(worker.models, worker.backends, strict=False)) for worker in workers]
    return sorted({backends[model] for backends in chosen if model in backends})


@asynccontextmanager
async def _answering() -> AsyncIterator[None]:
    """Bound a call, and say in our words that the server does not answer."""
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            yield
    except (RedisError, TimeoutError) as error:
        raise QueueUnavailable(
            f"expected an answer from Redis, got {type(error).__name__}: {error}"
        ) from error
