"""One HTTP connection without a client library, so that a latency holds the server's time and hardly any of our own.

An answer's end is when the kernel has its last byte for us, not when this process gets a core to read it: that may be
after the server has counted and logged the answer on the same core, which is no part of what a client waits for.
"""

import socket
import struct
import time
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

CHUNK = 1 << 16
TIMEOUT_S = 60.0
SO_TIMESTAMPNS = 35  # Linux: asks for the time of a segment's arrival, as two 64-bit numbers, s and ns


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
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._arrival_ns = 0

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
        start_ns = time.time_ns()  # the clock of the arrivals
        self._socket.sendall(request)
        answer, end = self._receive(b""), -1
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer = self._receive(answer)
        wanted = end + 4 + _content_length(answer[:end])
        while len(answer) < wanted:
            answer = self._receive(answer)
        ms = (self._arrival_ns - start_ns) / 1e6
        return ms, int(answer[9:12]), answer[end + 4 :]

    def _receive(self, before: bytes) -> bytes:
        chunk, told, _, _ = self._socket.recvmsg(CHUNK, socket.CMSG_SPACE(16))
        if not chunk:
            raise ConnectionError("expected an answer, and the server closed the connection")
        s, ns = struct.unpack("qq", told[0][2])
        self._arrival_ns = s * 1_000_000_000 + ns
        return before + chunk


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise ValueError("expected an answer with a content-length")
