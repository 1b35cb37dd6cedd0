"""Around every request: an id, a log line, a metric, a limit on the declared body, and no bare 500."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashbulb_service.api.errors import (
    BodyTimeout,
    BodyTooLarge,
    TooManyUploads,
    WrongHost,
    describe,
)
from flashbulb_service.api.hosts import PROBES, accepts
from flashbulb_service.api.short_way import ShortWay
from flashbulb_service.errors import ServiceError
from flashbulb_service.observability import Metrics, known_method

log = logging.getLogger(__name__)


UPLOAD_ROUTES = (
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/videos",
    "/v1/videos/edits",
    "/v1/videos/extensions",
    "/v1/videos/characters",
)
SMALL_BYTES = 64 * 1024  # what a connection buffers anyway
MAX_UPLOADS = 8  # of full size that one process holds at once
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class Bodies:
    """Reads bodies whole, and bounds what the large ones take of this process's memory until they are dropped."""

    def __init__(self, max_held_bytes: int) -> None:
        """Hold at most so many bytes at once; bodies of up to SMALL_BYTES are not counted."""
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0

    async def read(self, receive: Receive, *, max_bytes: int) -> bytes | None:
        """Read a body, which is to be dropped afterwards; None when the client left before its end.

        Raises:
            BodyTooLarge: it is longer than max_bytes.
            TooManyUploads: others take what there is for them together.
        """
        parts: list[bytes] = []
        size = held = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                size += len(part)
                if size > max_bytes:
                    raise BodyTooLarge(
                        f"expected a body of at most {max_bytes} bytes, got more: send a shorter one"
                    )
                if size > SMALL_BYTES:
                    self._hold(size - held)
                    held = size
                parts.append(part)
                if not message.get("more_body", False):
                    body = b"".join(parts)
                    held = 0  # by the caller from now on
                    return body
        finally:
            self._held_bytes -= held

    def drop(self, body: bytes) -> None:
        """Give back what a body that was read has taken."""
        if len(body) > SMALL_BYTES:
            self._held_bytes -= len(body)

    def _hold(self, more_bytes: int) -> None:
        if self._held_bytes + more_bytes > self._max_held_bytes:
            raise TooManyUploads(
                f"expected at most {self._max_held_bytes} bytes of large bodies at once, got more from all clients "
                "together: try again later"
            )
        self._held_bytes += more_bytes


class RequestFrame:
    """Pure ASGI, so that a client's disconnect reaches the route that waits for it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        admit: Callable[[Scope], Awaitable[None]],
        metrics: Metrics,
        max_body_bytes: int,
        max_upload_bytes: int,
        body_timeout_s: float,
        bound_to: str,
        allowed_hosts: Collection[str],
        short_way: ShortWay | None = None,
    ) -> None:
        """Wrap an app; `admit` raises for a request that is not served, before its body is read."""
        self._short_way = short_way
        self._admit = admit
        self._bound_to = bound_to
        self._allowed_hosts = allowed_hosts
        self._body_timeout_s = body_timeout_s
        self._max_upload_bytes = max_upload_bytes
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._bodies = Bodies(MAX_UPLOADS * max(max_body_bytes, max_upload_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._short_way is not None:
            self._short_way.announce(scope)
        request_id = f"req_{secrets.token_hex(12)}"
        client_id = Headers(scope=scope).get("x-client-request-id", "")
        # Rate limits and the like: whoever knows them puts them here, and every answer carries them.
        extra: dict[str, str] = scope.setdefault("state", {}).setdefault("answer_headers", {})
        start = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                if _CLIENT_ID.fullmatch(client_id):
                    headers["x-client-request-id"] = client_id
                headers.update(extra)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._serve(scope, receive, send_with_id)
            except Exception as error:
                log.exception("unforeseen error in %s", getattr(scope.get("route"), "path", "unmatched"))
                if status:
                    raise  # the answer has begun: the connection must break, or it would look whole
                await describe(error).response()(scope, receive, send_with_id)
            finally:
                took_s = time.monotonic() - start
                try:
                    await asyncio.sleep(
                        0
                    )  # the loop sends what was written after this turn: the answer goes first
                finally:
                    self._account(scope, status, took_s)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = Headers(scope=scope).getlist("host")
        if not accepts(hosts, path=scope["path"], bound_to=self._bound_to, allowed=self._allowed_hosts):
            wrong = WrongHost(
                f"expected a Host header that names this server, got {', '.join(hosts)!r}: "
                "use its own address, or add the name to FLASHBULB_ALLOWED_HOSTS"
            )
            await describe(wrong).response()(scope, receive, send)
            return
        try:
            await self._admit(scope)
        except ServiceError as refusal:
            answer = describe(refusal)
            if answer.status == 429:
                self._metrics.shed(answer.code)
            await answer.response()(scope, receive, send)
            return
        limit = self._max_upload_bytes if scope["path"] in UPLOAD_ROUTES else self._max_body_bytes
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > limit:
            error = BodyTooLarge(
                f"expected a body of at most {limit} bytes, got {declared}: send a shorter one"
            )
            await describe(error).response()(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._body_timeout_s):
                body = await self._bodies.read(receive, max_bytes=limit)
        except TimeoutError:
            late = BodyTimeout(f"expected the whole body within {self._body_timeout_s:g} s: send it faster")
            await describe(late).response()(scope, receive, send)
            return
        except (BodyTooLarge, TooManyUploads) as error:
            await describe(error).response()(scope, receive, send)
            return
        if body is None:
            return
        try:
            if self._short_way is None or not await self._short_way.serve(scope, body, receive, send):
                await self._app(scope, _replay(body, receive), send)
        finally:
            self._bodies.drop(body)

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.request(route, scope["method"], status, seconds)
        level = logging.DEBUG if route in PROBES else logging.INFO
        # The route and not the path: who knows the path of a picture may see it, and a path may hold anything.
        method = known_method(scope["method"])
        log.log(level, "%s %s %d in %.1f ms", method, route, status, seconds * 1000)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already once more, and then what comes from the client."""
    given = False

    async def once_more() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once_more
