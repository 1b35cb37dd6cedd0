"""Clients of the server that holds the queue, and its failures in our words."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from flashbulb_service.errors import QueueUnavailable

CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
MAX_BLOCKING = 32  # calls that wait for the server to tell something; a process has a handful

# Redis itself is well but refuses to write: full, a replica, or its disk is failing.
_REFUSALS = ("MISCONF", "NOREPLICAS", "OOM", "READONLY", "LOADING", "MASTERDOWN")


def open_client(url: str, max_connections: int) -> "Redis":
    """Make a client of `redis://host:port/db` or `unix:///path/to/socket`; it connects lazily."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        # With a socket_timeout redis-py goes through asyncio.wait_for, which on Python 3.11 now and then
        # swallows a cancellation; calls are bounded by asyncio.timeout instead.
        socket_timeout=None,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), 3),
    )
    return Redis.from_pool(pool)


def patient_client(client: "Redis") -> "Redis":
    """Copy a client for calls that block: their own connections, and no limit on reading."""
    pool = client.connection_pool
    kwargs = {**pool.connection_kwargs, "socket_timeout": None, "socket_connect_timeout": CONNECT_TIMEOUT_S}
    return Redis.from_pool(
        ConnectionPool(connection_class=pool.connection_class, max_connections=MAX_BLOCKING, **kwargs)
    )


@asynccontextmanager
async def unavailable(timeout_s: float = CALL_TIMEOUT_S) -> AsyncIterator[None]:
    """Bound a call, and say in our words that the server cannot be used; let bugs through as they are."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise QueueUnavailable(
            f"the queue's Redis or Valkey server did not answer within {timeout_s:g} s"
        ) from error
    except (RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError) as error:
        raise QueueUnavailable(f"the queue's Redis or Valkey server cannot be used: {error}") from error
    except ResponseError as error:
        if not str(error).startswith(_REFUSALS):
            raise
        raise QueueUnavailable(f"the queue's Redis or Valkey server refuses writes: {error}") from error
