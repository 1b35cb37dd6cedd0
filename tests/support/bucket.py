"""A folder as a bucket: the part of S3 that reading takes (list, head, ranges), and a web server that knows ranges.

Faults can be planted by path, and every request is written down.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlparse
from xml.sax.saxutils import escape

Fault = Callable[
    [str, int], int | bytes | None
]  # (path, first byte) -> a status, other bytes, or None: go on


@dataclass
class Bucket:
    """Serves `folder` as the bucket "models" while it is open."""

    folder: Path
    fault: Fault = lambda path, start: None
    asked: list[tuple[str, str, int]] = field(
        default_factory=list
    )  # (method, path in the bucket, first byte)
    keys: set[str] = field(default_factory=set)  # access keys that signed a request

    def __enter__(self) -> Self:
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                bucket._answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """Return the address of the server."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self) -> dict[str, str]:
        """Return what a client of S3 is to have in its environment."""
        return {
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "here-1",
            "AWS_ACCESS_KEY_ID": "AKIDTEST",
            "AWS_SECRET_ACCESS_KEY": "very-secret-word",
        }

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlparse(request.path)
        path = unquote(url.path).removeprefix("/models").strip("/")
        signed = request.headers.get("authorization", "")
        if "Credential=" in signed:
            self.keys.add(signed.partition("Credential=")[2].partition("/")[0])
        if not path and url.query:
            self._send(request, 200, self._listing(parse_qs(url.query)), {"content-type": "application/xml"})
            return
        start, end = 0, -1
        file = self.folder / path
        if "range" in request.headers:
            first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) if last else -1
        self.asked.append((request.command, path, start))
        planted = self.fault(path, start)
        if isinstance(planted, int) or not file.is_file():
            self._send(request, planted if isinstance(planted, int) else 404, b"", {})
            return
        data = planted if planted is not None else file.read_bytes()
        headers = {"etag": f'"{len(data)}"', "last-modified": "Sun, 01 Nov 2026 00:00:00 GMT"}
        if "range" in request.headers:
            end = len(data) - 1 if end < 0 else min(end, len(data) - 1)
            headers["content-range"] = f"bytes {start}-{end}/{len(data)}"
            self._send(request, 206, data[start : end + 1], headers)
        else:
            self._send(request, 200, data, headers)

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        below = self.folder / prefix
        names = sorted(one.name for one in below.iterdir() if one.is_dir()) if below.is_dir() else []
        folders = "".join(
            f"<CommonPrefixes><Prefix>{escape(prefix + name)}/</Prefix></CommonPrefixes>" for name in names
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>models</Name>'
            f"<IsTruncated>false</IsTruncated>{folders}</ListBucketResult>"
        ).encode()

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str]
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "content-length": str(len(data))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)
