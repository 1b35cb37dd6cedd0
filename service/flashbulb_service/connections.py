"""A limit on how long and how large the head of a request may be; uvicorn has neither.

A client that sends its head a byte a minute, or without end, would otherwise hold a connection for ever.
"""

import asyncio
import json
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024


def refusal(status: str, code: str, message: str) -> bytes:
    """Return a whole answer in the form of all our errors; it ends the connection."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


class PromptHeads(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with a clock and a measure on every request's head."""

    def __init__(self, *args: Any, head_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a connection that says nothing is no request."""
        super().connection_made(transport)
        self._start_clock()

    def data_received(self, data: bytes) -> None:
        """Count what arrives before the head is whole."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes:  # most heads come whole, and need no clock
            self._start_clock()
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(
                "431 Request Header Fields Too Large",
                "headers_too_large",
                f"expected headers of at most {MAX_HEAD_BYTES} bytes: send fewer",
            )

    def on_headers_complete(self) -> None:
        """Stop the clock."""
        self._in_head = False
        self._stop_clock()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Expect the next head; its clock starts with its first byte, until then uvicorn's own one runs."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def _start_clock(self) -> None:
        if self._head_timer is None:
            late = f"expected the headers within {self._head_timeout_s:g} s: send them faster"
            self._head_timer = self.loop.call_later(
                self._head_timeout_s, partial(self._refuse, "408 Request Timeout", "request_timeout", late)
            )

    def _stop_clock(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: str, code: str, message: str) -> None:
        self._stop_clock()
        if not self.transport.is_closing():
            self.transport.write(refusal(status, code, message))
            self.transport.close()
