"""The short way of a plain request for pictures: straight to its route's function, with the same models and errors.

Routing and dependencies take the framework longer than the request itself takes. It still gets what is out of the
ordinary: streams, other content types, repeated headers, and what is not valid, for it says what is wrong.
"""

import json
from collections.abc import Mapping

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from flashbulb_service.api import images
from flashbulb_service.api.context import context_of
from flashbulb_service.api.errors import answer_error
from flashbulb_service.api.schemas import ImagesRequest
from flashbulb_service.errors import ServiceError
from flashbulb_service.head_start import ApiEnd

CONTENT_TYPE = b"application/json"
READ = (b"content-type", b"idempotency-key", b"x-stainless-retry-count")  # headers that the route reads


class ShortWay:
    """Serves the plain ones among the requests to `POST /v1/images/generations`."""

    def __init__(self, head_starts: ApiEnd | None = None) -> None:
        """Find the route that requests are counted under. head_starts: of the worker that such requests are for."""
        self._head_starts = head_starts
        (self._route,) = (
            route for route in images.router.routes if getattr(route, "path", "") == images.PATH
        )

    def announce(self, scope: Scope) -> None:
        """Tell the worker that a request has begun, if it may be a plain one."""
        if self._head_starts is not None and scope["path"] == images.PATH:
            self._head_starts.announce()

    async def serve(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        """Answer a request whose body has arrived, and return whether that was done; if not, nothing has happened."""
        read = self.read(scope, body)
        if read is None:
            return False
        asked, headers = read
        scope["route"] = self._route
        request = Request(scope, receive)
        answer: Response
        try:
            answer = await images.generate_images(
                request,
                asked,
                await context_of(request),
                headers.get(b"idempotency-key"),
                headers.get(b"x-stainless-retry-count"),
            )
        except ServiceError as error:
            answer = await answer_error(request, error)
        await answer(scope, receive, send)
        return True

    def read(self, scope: Scope, body: bytes) -> tuple[ImagesRequest, Mapping[bytes, str]] | None:
        """Return what a plain request asks for, and those of its headers that count; None: it is not plain."""
        if scope["path"] != images.PATH or scope["method"] != "POST":
            return None
        given = [(name, value) for name, value in scope["headers"] if name in READ]
        headers = {name: value.decode("latin-1") for name, value in given}
        if len(headers) < len(given) or (b"content-type", CONTENT_TYPE) not in given:
            return None
        try:
            asked = ImagesRequest.model_validate(json.loads(body))
        except (ValueError, RecursionError):
            return None
        return None if asked.stream else (asked, headers)
