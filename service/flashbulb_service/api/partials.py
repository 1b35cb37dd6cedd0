"""Previews of a streamed request, as the worker tells them through the queue's events."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from flashbulb_service.api.context import Context
from flashbulb_service.api.errors import TooManyStreams
from flashbulb_service.api.identity import EVERYBODY
from flashbulb_service.errors import NewerMessage
from flashbulb_service.queue import Event
from flashbulb_service.tasks import Preview, RequestRecord

MAX_STREAMS = 1_000  # that one process watches
MAX_STREAMS_OF_KEY = MAX_STREAMS // 4  # reading is free: no other limit keeps one key from having all


def check_room(context: Context, owner: str) -> None:
    """Refuse to watch one more request than a process may, in all and for one key.

    Raises:
        TooManyStreams: it watches as many as it may.
    """
    events = context.queue.events
    if events.watched >= MAX_STREAMS:
        raise TooManyStreams(f"this process already serves {MAX_STREAMS} event streams: try again later")
    if owner != EVERYBODY and events.watched_by(owner) >= MAX_STREAMS_OF_KEY:
        raise TooManyStreams(
            f"this process already serves {MAX_STREAMS_OF_KEY} event streams of your key: "
            "end one, or try again later"
        )


def preview_of(event: Event) -> Preview | None:
    """Return the preview that an event tells of, None when it tells something else."""
    if event.kind == "progress":
        with contextlib.suppress(ValueError, NewerMessage):
            return Preview.from_bytes(event.data.get("data", "").encode())
    return None


async def partial_images(
    context: Context,
    ids: Sequence[str],
    record: RequestRecord,
    ended: "asyncio.Task[Any]",
    ping_s: float,
    owner: str,
) -> AsyncIterator[dict[str, Any] | None]:
    """Yield an event per preview until `ended` is done, and None after every `ping_s` without one.

    A second attempt at a picture draws the same previews; each is told once.
    """
    told: set[tuple[int, int]] = set()
    after = "0"
    watching = context.queue.watch(ids[0], after=after, quiet_s=ping_s, owner=owner)
    following = asyncio.create_task(anext(watching))
    try:
        while not ended.done():
            await asyncio.wait({ended, following}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                event = following.result()
                following = asyncio.create_task(anext(watching))
                if event is None:
                    yield None
                    continue
                after = event.id
                if (made := await _partial(context, record, event, told)) is not None:
                    yield made
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await watching.aclose()
    for event in await context.queue.past_events(ids[0], after=after):
        if (made := await _partial(context, record, event, told)) is not None:
            yield made


async def _partial(
    context: Context, record: RequestRecord, event: Event, told: set[tuple[int, int]]
) -> dict[str, Any] | None:
    preview = preview_of(event)
    if preview is None or (event.row, preview.partial_image_index) in told:
        return None
    data = await context.results.get(preview.file)
    if data is None:
        return None
    told.add((event.row, preview.partial_image_index))
    return {
        "type": "image_generation.partial_image",
        "b64_json": base64.b64encode(data).decode(),
        "partial_image_index": preview.partial_image_index,
        "created_at": int(event.at),
        "size": record.size,
        "quality": record.quality,
        "background": "opaque",
        "output_format": record.image_format,
        "index": event.row,
        "seed": record.seed,
    }
