"""One plain connection to the queue's server: commands leave as they come, replies arrive in their order.

A general client chooses a connection, a policy and a parser for every call, which takes longer than the server needs
for it. What every picture waits for goes by a line; all else takes the client.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis
from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from flashbulb_service.queue.connection import (
    CALL_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    Part,
    greetings,
    in_our_words,
    pack,
    unavailable,
)

RETRY_PAUSES_S = (0.04, 0.08, 0.16)  # a command whose connection broke is sent again


class Line:
    """A connection that is made by the first call, and again after it was lost."""

    def __init__(
        self,
        client: "Redis",
        *,
        timeout_s: float | None = CALL_TIMEOUT_S,
        hear: Callable[[bytes], None] | None = None,
        lost: Callable[[], None] | None = None,
    ) -> None:
        """Go where a client goes, with its credentials.

        Args:
            timeout_s: how long the server may take for a reply; None: the caller says so, and a call that is cancelled
                ends the connection, so that no reply is taken from the server and heard by nobody.
            hear: gets the messages of the channels that were subscribed to. lost: is called when they come no more.
        """
        pool = client.connection_pool
        # It never connects: it has read the address, the credentials and what TLS wants.
        self._address = pool.connection_class(**pool.connection_kwargs)
        self._timeout_s = timeout_s
        self._hear = hear
        self._lost = lost
        self._wire: _Wire | None = None
        self._opening = asyncio.Lock()
        self._calls = 0

    @property
    def is_busy(self) -> bool:
        """Tell whether a call has no reply yet."""
        return self._calls > 0

    async def call(self, *command: Part) -> Any:
        """Send a command and return the server's reply.

        After a broken connection the command is sent again: it may run twice.

        Raises:
            QueueUnavailable: the server cannot be reached, does not answer or refuses to serve.
            ResponseError: it says that the command is wrong.
        """
        packed = pack(*command)
        self._calls += 1
        try:
            if self._wire is not None and self._wire.is_open:
                try:
                    return await self._wire.send(packed)
                except RedisConnectionError:
                    pass  # sent again, on another connection
                except ResponseError as error:
                    raise in_our_words(error) from error
            return await self._call_anew(packed)
        except asyncio.CancelledError:
            if self._timeout_s is None and self._wire is not None:
                self._wire.close()
            raise
        finally:
            self._calls -= 1

    async def aclose(self) -> None:
        """Close the connection."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    async def _call_anew(self, packed: bytes) -> Any:
        async with unavailable(self._timeout_s):
            for pause_s in RETRY_PAUSES_S:
                try:
                    return await (await self._open()).send(packed)
                except RedisConnectionError:
                    await asyncio.sleep(pause_s)
            return await (await self._open()).send(packed)

    async def _open(self) -> "_Wire":
        async with self._opening:
            if self._wire is not None and self._wire.is_open:
                return self._wire
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    self._wire = await self._connect()
            except TimeoutError as error:
                raise RedisConnectionError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
            except OSError as error:
                raise RedisConnectionError(str(error)) from error
            return self._wire

    async def _connect(self) -> "_Wire":
        loop, to = asyncio.get_running_loop(), self._address
        wire = _Wire(self._timeout_s, self._hear, self._lost)
        if isinstance(to, UnixDomainSocketConnection):
            await loop.create_unix_connection(lambda: wire, to.path)
        else:
            assert isinstance(to, Connection)
            tls = to.ssl_context.get() if isinstance(to, SSLConnection) else None
            await loop.create_connection(lambda: wire, to.host, to.port, ssl=tls)
        try:
            for greeting in greetings(to):
                await wire.send(greeting)
        except ResponseError as error:
            wire.close()
            raise RedisConnectionError(str(error)) from error
        except BaseException:
            wire.close()
            raise
        return wire


class _Wire(asyncio.Protocol):
    """One connection, from its beginning to its end."""

    def __init__(
        self,
        timeout_s: float | None,
        hear: Callable[[bytes], None] | None,
        lost: Callable[[], None] | None,
    ) -> None:
        self._timeout_s = timeout_s
        self._hear = hear
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(protocolError=RedisConnectionError, replyError=ResponseError)
        self._pending: deque[tuple[asyncio.Future[Any], float]] = deque()  # and when each was sent
        self._watch: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.is_open = False

    def send(self, packed: bytes) -> "asyncio.Future[Any]":
        """Send a command; the future gets its reply, which may be an error."""
        reply: asyncio.Future[Any] = self._loop.create_future()
        if not self.is_open or self._transport is None:
            reply.set_exception(RedisConnectionError("the connection was closed"))
            return reply
        self._pending.append((reply, self._loop.time()))
        if self._watch is None and self._timeout_s is not None:
            self._watch = self._loop.call_later(self._timeout_s, self._look)
        self._transport.write(packed)
        return reply

    def close(self) -> None:
        """End the connection; what waits for replies gets an error."""
        self._end(RedisConnectionError("the connection was closed"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Hand out the replies that are whole."""
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                self._take(reply)
        except RedisConnectionError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all who wait."""
        self._end(RedisConnectionError(str(exc) if exc else "the server closed the connection"))

    def _take(self, reply: Any) -> None:
        if self._hear is not None and isinstance(reply, list) and reply[0] == b"message":
            self._hear(reply[2])
            return
        if not self._pending:
            raise RedisConnectionError("expected no reply, got one")
        waiting, _ = self._pending.popleft()
        if waiting.done():  # its caller left
            return
        if isinstance(reply, ResponseError):
            waiting.set_exception(reply)
        else:
            waiting.set_result(reply)

    def _look(self) -> None:
        """End a connection on which a reply is overdue."""
        self._watch = None
        if not self._pending:
            return
        assert self._timeout_s is not None
        left_s = self._pending[0][1] + self._timeout_s - self._loop.time()
        if left_s > 0:
            self._watch = self._loop.call_later(left_s, self._look)
            return
        self._end(in_our_words(TimeoutError(), self._timeout_s))

    def _end(self, error: Exception) -> None:
        if not self.is_open:
            return
        self.is_open = False
        if self._watch is not None:
            self._watch.cancel()
        while self._pending:
            waiting, _ = self._pending.popleft()
            if not waiting.done():
                waiting.set_exception(error)
        if self._transport is not None:
            self._transport.abort()
        if self._lost is not None:
            self._lost()
