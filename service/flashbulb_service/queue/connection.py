"""Clients of the server that holds the queue, and its failures in our words."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import hiredis
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    ClusterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from flashbulb_service.errors import QueueUnavailable

Part = str | bytes | int | float  # of a command

CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
MAX_BLOCKING = 32  # calls that wait for the server to tell something; a process has a handful

# Redis itself is well but does not serve now: full, a replica, just become one (UNBLOCKED), or its disk is failing.
# Of some the client makes classes, and takes the code off their text; one of these is MasterDownError's parent.
_REFUSED = (ClusterDownError, OutOfMemoryError, ReadOnlyError, TryAgainError)
_REFUSALS = (
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOAUTH",
    "NOREPLICAS",
    "OOM",
    "READONLY",
    "TRYAGAIN",
    "UNBLOCKED",
)
_OF_PIPELINE = " of pipeline caused error: "  # what stands before the server's words, as a tuple of one


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
async def unavailable(timeout_s: float | None = CALL_TIMEOUT_S) -> AsyncIterator[None]:
    """Bound a call, and say in our words that the server cannot be used; let bugs through as they are."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (TimeoutError, RedisError) as error:
        told = in_our_words(error, timeout_s)
        if told is error:
            raise
        raise told from error


def in_our_words(error: Exception, timeout_s: float | None = CALL_TIMEOUT_S) -> Exception:
    """Return what an error of a call means: that the server cannot be used, or a bug as it is."""
    if isinstance(error, (RedisConnectionError, RedisTimeoutError, *_REFUSED)):
        return QueueUnavailable(f"the queue's Redis or Valkey server cannot be used: {error}")
    if isinstance(error, TimeoutError):
        within = "in time" if timeout_s is None else f"within {timeout_s:g} s"
        return QueueUnavailable(f"the queue's Redis or Valkey server did not answer {within}")
    told = str(error).rpartition(_OF_PIPELINE)[2].lstrip("('\"")
    if isinstance(error, ResponseError) and told.startswith(_REFUSALS):
        return QueueUnavailable(f"the queue's Redis or Valkey server refuses to serve: {error}")
    return error


def pack(*command: Part) -> bytes:
    """Write a command as the server reads it."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its hints say a tuple of one
    return packed


def greetings(to: AbstractConnection) -> list[bytes]:
    """Return the commands that open a connection: who we are, and which database is meant."""
    name = [to.username] if to.username else []
    auth = [pack("AUTH", *name, to.password)] if to.password else []
    return auth + ([pack("SELECT", to.db)] if to.db else [])
