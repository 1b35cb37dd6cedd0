"""Around every request: an id, a log line, a metric, a limit on the declared body, and no bare 500."""

import logging
import secrets
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashbulb_service.api.errors import BodyTooLarge, describe
from flashbulb_service.observability import Metrics, known_method

log = logging.getLogger(__name__)


class RequestFrame:
    """Pure ASGI, so that a client's disconnect reaches the route that waits for it."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int) -> None:
        """Wrap an app."""
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        start = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
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
                self._account(scope, status, time.monotonic() - start)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            error = BodyTooLarge(
                f"expected a body of at most {self._max_body_bytes} bytes, got {declared}: send a shorter one"
            )
            await describe(error).response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.request(route, scope["method"], status, seconds)
        level = logging.DEBUG if route in ("/livez", "/readyz", "/metrics") else logging.INFO
        # The route and not the path: who knows the path of a picture may see it, and a path may hold anything.
        method = known_method(scope["method"])
        log.log(level, "%s %s %d in %.1f ms", method, route, status, seconds * 1000)
