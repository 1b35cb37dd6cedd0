"""One HTTP connection without a client library, so that a latency holds the server's time and hardly any of our own."""

import socket
import time
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

CHUNK = 1 << 16
TIMEOUT_S = 60.0


class Wire:
    """A kept connection that sends one request at a time and waits for the whole answer."""

    def __init__(self, url: str) -> None:
        """Connect to the server of an http:// address."""
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._head = (
            f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        )
        self._socket = socket.create_connection((parts.hostname, parts.port), TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def post(self, body: bytes) -> tuple[float, int, bytes]:
        """Send a body: -> milliseconds from the first byte out to the last byte in, status, the answer's body.

        Raises:
            ConnectionError: the server closed the connection.
        """
        request = f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body
        start = time.perf_counter()
        self._socket.sendall(request)
        answer, end = self._receive(b""), -1
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer = self._receive(answer)
        wanted = end + 4 + _content_length(answer[:end])
        while len(answer) < wanted:
            answer = self._receive(answer)
        ms = (time.perf_counter() - start) * 1000
        return ms, int(answer[9:12]), answer[end + 4 :]

    def _receive(self, before: bytes) -> bytes:
        chunk = self._socket.recv(CHUNK)
        if not chunk:
            raise ConnectionError("expected an answer, and the server closed the connection")
        return before + chunk


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise ValueError("expected an answer with a content-length")
