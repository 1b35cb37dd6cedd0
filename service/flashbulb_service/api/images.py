"""POST /v1/images/generations, and the pictures it makes."""

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import format_sse_event

from flashbulb_service.api.answers import (
    AddressOf,
    finished,
    images_answer,
    overhead_ms,
    stream_events,
    usage,
)
from flashbulb_service.api.context import Context, Shared
from flashbulb_service.api.errors import ClientGone, RequestTimeout, ResultNotFound, describe
from flashbulb_service.api.identity import Caller, caller_of
from flashbulb_service.api.media import expect_json
from flashbulb_service.api.partials import check_room, partial_images
from flashbulb_service.api.plan import Plan, body_digest, check_webhook, keep, make_plan
from flashbulb_service.api.schemas import ERRORS, MAX_KEY_CHARS, DrawRequest, ImagesRequest
from flashbulb_service.errors import InvalidRequest, JobNotFound, QueueUnavailable, ServiceError
from flashbulb_service.jobs import JobView
from flashbulb_service.queue import Expected, KeyMode, new_id
from flashbulb_service.results import media_type
from flashbulb_service.safety import check_prompt
from flashbulb_service.tasks import RequestRecord

log = logging.getLogger(__name__)
router = APIRouter(responses=ERRORS)

PATH = "/v1/images/generations"
PING_S = 15.0
RETRY_WINDOW_S = (
    60.0  # a client library's retry gets the jobs of its first attempt, if they ended this recently
)

IdempotencyHeader = Annotated[str | None, Header()]
RetryHeader = Annotated[str | None, Header(alias="x-stainless-retry-count", include_in_schema=False)]


@dataclass(frozen=True)
class Key:
    """By what a request is recognised when it comes again, and how."""

    text: str | None = None
    mode: KeyMode = "replay"
    digest: str | None = None  # of the request

    @property
    def keeps(self) -> bool:
        """Tell whether the client may come back for the jobs after it left."""
        return self.text is not None and self.mode == "replay"


@router.post(
    PATH,
    summary="Draw pictures from a prompt",
    dependencies=[Depends(expect_json)],
    responses={
        200: {
            "description": "The pictures, or with stream=true their events",
            "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
        }
    },
)
async def generate_images(
    request: Request,
    body: ImagesRequest,
    context: Shared,
    idempotency_key: IdempotencyHeader = None,
    retry_count: RetryHeader = None,
) -> Response:
    """Queue one job per picture, wait for all of them, and answer as OpenAI does."""
    start = time.monotonic()
    caller = caller_of(request, body)
    plan = make_plan(body, context.catalog, caller, context.settings)
    key = choose_key(body, idempotency_key, retry_count)
    watched = body.stream and body.partial_images > 0 and plan.record.steps > 1
    if watched:
        check_room(context, caller.owner)
    queued = await enqueue(context, plan, body, caller, key, events=watched, ahead=may_run_ahead(body, key))
    headers = answer_headers(plan, replayed=queued.replayed)
    if body.stream:
        watcher = caller.owner if watched else None
        events = _stream(context, queued, start, keep=key.keeps, watcher=watcher)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"}
        )
    used = usage(context, queued.record, queued.record.n)  # counted now, while a worker draws
    views = await _wait(context, request, queued, keep=key.keeps)
    answer, receipt = await images_answer(context, queued.record, views, address_of(context, request), used)
    _count(context, queued, views, start)
    return JSONResponse(answer, headers={**headers, **receipt.headers()})


@router.get(
    "/v1/images/results/{name}",
    summary="A picture by the address that response_format=url gave",
    response_class=Response,
    responses={
        200: {
            "description": "The picture",
            "content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}},
        }
    },
)
async def get_result(name: str, context: Shared) -> Response:
    """Serve a picture from the result store until its time is over."""
    data = await context.results.get(name)
    if data is None:
        raise ResultNotFound(
            f"no picture {name[:120]!r}: the name is wrong, or its time is over; draw it again"
        )
    # The name is random and its bytes never change: whoever has it may keep it.
    return Response(
        data, media_type=media_type(name), headers={"cache-control": "private, max-age=86400, immutable"}
    )


@dataclass(frozen=True)
class Queued:
    """A request in the queue: its jobs, and its record as it was first made."""

    ids: tuple[str, ...]
    record: RequestRecord
    replayed: bool
    waiter: str  # who waits for them here
    expected: Expected | None = None  # where the news of their end arrives


def choose_key(
    body: DrawRequest, header: str | None, retry_count: str | None, *, route: str | None = None
) -> Key:
    """Return the client's idempotency key, else for a client library's request one made of its body.

    Equal first attempts stay apart, for people want different pictures; only a retry may join an earlier one.
    route: where it was sent, None for the images route.

    Raises:
        InvalidRequest: the key is empty or long, or header and body disagree.
    """
    if header is not None and not 0 < len(header) <= MAX_KEY_CHARS:
        raise InvalidRequest(
            f"Idempotency-Key: expected 1 to {MAX_KEY_CHARS} characters, got {len(header)}",
            param="Idempotency-Key",
            code="invalid_value",
        )
    if header is not None and body.idempotency_key not in (None, header):
        raise InvalidRequest(
            "idempotency_key: expected the same key as in the header Idempotency-Key, or one of them only",
            param="idempotency_key",
            code="invalid_value",
        )
    text = header if header is not None else body.idempotency_key
    if text is not None:
        return Key(f"key {text}", digest=body_digest(body, route))
    if retry_count is None or not re.fullmatch(r"[0-9]{1,4}", retry_count):
        return Key()
    digest = body_digest(body, route)
    return Key(f"retry {digest}", "attach" if int(retry_count) > 0 else "record", digest)


def may_run_ahead(body: ImagesRequest, key: Key) -> bool:
    """Tell whether a request may be drawn before it is queued, and answered while it is committed.

    Nothing that can be asked for again, or is told of elsewhere, may depend on what is not committed.
    """
    is_seen_once = not key.keeps and key.mode != "attach" and body.webhook_url is None
    is_plain = not body.stream and not body.partial_images and body.response_format == "b64_json"
    return is_seen_once and is_plain


async def enqueue(
    context: Context,
    plan: Plan,
    body: DrawRequest,
    caller: Caller,
    key: Key,
    *,
    lists: tuple[str, ...] = (),
    events: bool = False,
    awaited: bool = True,
    ahead: bool = False,
) -> Queued:
    """Queue a planned request, or find the earlier one that it repeats; `awaited` as in `Queue.enqueue`.

    ahead: a worker may begin to draw it before it is queued, and tell us of the picture before that is committed.
    """
    check_prompt(context.words, body.prompt)
    check_webhook(body, context.settings)
    await context.queue.settled()
    ids = [new_id() for _ in plan.jobs]
    if ahead and context.head_starts is not None:
        context.head_starts.give(ids, plan.jobs)
    kept = key.text is not None or lists or events or body.webhook_url is not None
    enqueued = await context.queue.enqueue(
        plan.jobs,
        idempotency_key=key.text,
        request_digest=key.digest,
        mode=key.mode,
        window_s=RETRY_WINDOW_S,
        keep=keep(plan.record, caller, lists=lists, events=events) if kept else None,
        awaited=awaited,
        ids=ids,
    )
    if enqueued.created:
        return Queued(
            enqueued.ids,
            plan.record,
            replayed=False,
            waiter=enqueued.waiter,
            expected=enqueued.expected,
        )
    first = await context.queue.request(enqueued.ids[0])
    if first is None:
        raise JobNotFound(enqueued.ids[0])
    record = RequestRecord.from_bytes(first.record)
    return Queued(enqueued.ids, record, replayed=True, waiter=enqueued.waiter)


def answer_headers(plan: Plan, *, replayed: bool) -> dict[str, str]:
    """Return the headers that tell what was ignored, and that an answer is an earlier one."""
    headers = {"x-flashbulb-warning": "; ".join(plan.warnings)} if plan.warnings else {}
    return {**headers, "idempotent-replayed": "true"} if replayed else headers


async def _stream(
    context: Context, queued: Queued, start: float, *, keep: bool, watcher: str | None
) -> AsyncIterator[bytes]:
    """Send pings and previews, the pictures when they are there, an error in the client library's form.

    watcher: who watches for previews, None when nobody does.
    """
    timeout_s = context.settings.request_timeout_s
    waiting = asyncio.create_task(context.queue.wait(queued.ids, timeout_s, expected=queued.expected))
    answered = False
    try:
        try:
            if watcher is not None:
                async for partial in partial_images(
                    context, queued.ids, queued.record, waiting, PING_S, watcher
                ):
                    yield _sse(partial["type"], partial) if partial else format_sse_event(comment="ping")
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=PING_S)
                if not waiting.done():
                    yield format_sse_event(comment="ping")
            views = waiting.result()
            answered = True
            for event in await stream_events(context, queued.record, views):
                yield _sse(event["type"], event)
            _count(context, queued, views, start)
        except TimeoutError:
            yield _sse_error(RequestTimeout("the pictures did not come in time: try again later"))
        except ServiceError as error:
            yield _sse_error(error)
        except Exception as error:
            log.exception("unforeseen error in a stream")
            yield _sse_error(error)
        yield b"data: [DONE]\n\n"
    finally:
        waiting.cancel()
        if not answered and not keep:
            # This runs while the response is being cancelled: the jobs must not be forgotten with it.
            await asyncio.shield(abandon(context, queued))


def _sse(name: str, data: Mapping[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data))


def _sse_error(error: Exception) -> bytes:
    return format_sse_event(event="error", data_str=json.dumps(describe(error).body()))


def _count(context: Context, queued: Queued, views: Sequence[JobView], start: float) -> None:
    if not queued.replayed:
        added_ms = overhead_ms([finished(view) for view in views], (time.monotonic() - start) * 1000)
        context.metrics.answered(queued.record.model, added_ms / 1000)


def address_of(context: Context, request: Request) -> AddressOf:
    """Return what makes addresses of pictures: under `public_url`, or under the Host that was checked."""

    def address(name: str) -> str:
        public = context.settings.public_url
        if public is None:
            return str(request.url_for("get_result", name=name))
        return public.rstrip("/") + str(request.app.url_path_for("get_result", name=name))

    return address


async def _wait(context: Context, request: Request, queued: Queued, *, keep: bool) -> list[JobView]:
    """Wait for jobs as long as the client does; cancel them when nobody will read them.

    With `keep` (an idempotency key) the client may come back for them, so they run on.
    """
    timeout_s = context.settings.request_timeout_s
    leaving = asyncio.create_task(_disconnect(request))
    answered = False
    try:
        async with asyncio.timeout(None) as stay:
            leaving.add_done_callback(partial(_end, stay))
            views = await context.queue.wait(queued.ids, timeout_s, expected=queued.expected)
            answered = True
        return views
    except TimeoutError as error:
        if leaving.done():
            raise ClientGone("the client closed the connection before its pictures were ready") from error
        raise RequestTimeout(f"expected the pictures within {timeout_s:.0f} s: try again later") from error
    finally:
        leaving.cancel()
        if not answered and not keep:
            await abandon(context, queued)


def _end(stay: asyncio.Timeout, leaving: "asyncio.Task[None]") -> None:
    """End a wait, since the client has left."""
    if not leaving.cancelled():
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            stay.reschedule(0.0)  # a time long ago


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass  # the rest of the body


async def abandon(context: Context, queued: Queued) -> None:
    """Cancel jobs whose client left, unless another request has joined them and still waits."""
    with contextlib.suppress(QueueUnavailable):
        cancelled = await context.queue.abandon(queued.ids, queued.waiter)
        context.metrics.abandoned.inc(cancelled)
        log.info("a client left, and %d jobs that nobody else waits for were cancelled", cancelled)
