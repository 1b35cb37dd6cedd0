"""A connection for threads: whoever calls waits for the reply himself, and wakes no event loop on the way."""

import contextlib
import socket
import threading
from typing import Any

import hiredis
from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from flashbulb_service.queue.connection import CONNECT_TIMEOUT_S, Part, greetings, in_our_words, pack

TIMEOUT_S = 2.0
CHUNK = 1 << 16


class Direct:
    """A connection that is made by the first call. A call that fails is not repeated: its caller knows another way."""

    def __init__(self, client: "Redis") -> None:
        """Go where a client goes, with its credentials."""
        pool = client.connection_pool
        self._address = pool.connection_class(**pool.connection_kwargs)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._reader = hiredis.Reader()

    def call(self, *command: Part) -> Any:
        """Send a command and return the server's reply, from any thread.

        Raises:
            QueueUnavailable: the server cannot be reached, does not answer or refuses to serve.
            ResponseError: it says that the command is wrong.
        """
        with self._lock:
            try:
                if self._socket is None:
                    self._connect()
                return self._ask(pack(*command))
            except (OSError, RedisConnectionError) as error:
                self._drop()
                raise in_our_words(RedisConnectionError(str(error))) from error
            except ResponseError as error:
                raise in_our_words(error) from error

    def close(self) -> None:
        """Close the connection; a call that waits for its reply fails."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._drop()

    def _ask(self, packed: bytes) -> Any:
        assert self._socket is not None
        self._socket.sendall(packed)
        while (reply := self._reader.gets()) is False:
            data = self._socket.recv(CHUNK)
            if not data:
                raise RedisConnectionError("the server closed the connection")
            self._reader.feed(data)
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    def _connect(self) -> None:
        to = self._address
        self._reader = hiredis.Reader(protocolError=RedisConnectionError, replyError=ResponseError)
        if isinstance(to, UnixDomainSocketConnection):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(CONNECT_TIMEOUT_S)
            self._socket.connect(to.path)
        else:
            assert isinstance(to, Connection)
            self._socket = socket.create_connection((to.host, to.port), CONNECT_TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if isinstance(to, SSLConnection):
                self._socket = to.ssl_context.get().wrap_socket(self._socket, server_hostname=to.host)
        self._socket.settimeout(TIMEOUT_S)
        try:
            for greeting in greetings(to):
                self._ask(greeting)
        except ResponseError as error:
            raise RedisConnectionError(str(error)) from error

    def _drop(self) -> None:
        found, self._socket = self._socket, None
        if found is not None:
            found.close()
