"""From ended jobs to answers. Only what is stored goes in, so that a repeated answer has the same bytes."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flashbulb_service.api.context import Context
from flashbulb_service.api.errors import ResultNotFound
from flashbulb_service.api.usage import count_usage
from flashbulb_service.errors import JobCancelled, JobFailed, UnknownModel
from flashbulb_service.jobs import JobState, JobView
from flashbulb_service.receipts import Receipt, make_receipt
from flashbulb_service.tasks import ImageOutcome, RequestRecord

AddressOf = Callable[[str], str]  # result id -> URL


@dataclass(frozen=True)
class Picture:
    """A finished job: where its picture lies, and how long it waited."""

    outcome: ImageOutcome
    queue_ms: float
    total_ms: float
    data: bytes | None = None  # its file, where it came with the news of its end


def finished(view: JobView) -> Picture:
    """Read a job that has ended.

    Raises:
        JobFailed, JobCancelled: it has no result.
    """
    if view.state is JobState.CANCELLED:
        raise JobCancelled(view.id)
    if view.state is not JobState.DONE or view.result is None:
        code, message = (
            (view.error.code, view.error.message) if view.error else ("job_failed", "no reason given")
        )
        raise JobFailed(view.id, code, message)
    waited_s = (view.started_at or view.enqueued_at) - view.enqueued_at
    total_s = (view.finished_at or view.enqueued_at) - view.enqueued_at
    return Picture(
        ImageOutcome.from_bytes(view.result),
        max(0.0, waited_s * 1000),
        max(0.0, total_s * 1000),
        view.attached,
    )


def summarise(pictures: Sequence[Picture]) -> dict[str, float]:
    """Tell where a request's time went: of each part, the slowest picture's, in milliseconds."""
    timings = {
        "queue_ms": max(picture.queue_ms for picture in pictures),
        "batch_ms": max(picture.outcome.batch_ms for picture in pictures),
        "encode_ms": max(picture.outcome.encode_ms for picture in pictures),
        "total_ms": max(picture.total_ms for picture in pictures),
    }
    return {name: round(value, 3) for name, value in timings.items()}


def overhead_ms(pictures: Sequence[Picture], total_ms: float) -> float:
    """Return what of a request's time was neither waiting, drawing nor encoding of its slowest picture."""
    return total_ms - max(p.queue_ms + p.outcome.batch_ms + p.outcome.encode_ms for p in pictures)


async def images_answer(
    context: Context,
    record: RequestRecord,
    views: Sequence[JobView],
    address_of: AddressOf,
    used: dict[str, Any] | None,
) -> tuple[dict[str, Any], Receipt]:
    """Build the answer of the images route, and its receipt; `used` is its usage."""
    pictures = [finished(view) for view in views]
    receipt = make_receipt(record.model, [picture.outcome for picture in pictures], summarise(pictures))
    answer = {
        "created": int(views[0].enqueued_at),
        "data": [
            {**await _content(context, record, picture, address_of), "seed": record.seed, "index": index}
            for index, picture in enumerate(pictures)
        ],
        "background": "opaque",
        "output_format": record.image_format,
        "quality": record.quality,
        "size": record.size,
        "usage": used,
        "model": record.model,
        "timings": dict(receipt.timings),
        "batch_size": receipt.batch_size,
        "receipt": receipt.body(),
    }
    return answer, receipt


async def stream_events(
    context: Context, record: RequestRecord, views: Sequence[JobView]
) -> list[dict[str, Any]]:
    """Build the events that end a streamed request: one per picture."""
    events = []
    for index, view in enumerate(views):
        picture = finished(view)
        events.append(
            {
                "type": "image_generation.completed",
                "b64_json": await _base64(context, picture),
                "created_at": int(views[0].enqueued_at),
                "size": record.size,
                "quality": record.quality,
                "background": "opaque",
                "output_format": record.image_format,
                "usage": usage(context, record, 1),
                "seed": record.seed,
                "index": index,
                "model": record.model,
            }
        )
    return events


def usage(context: Context, record: RequestRecord, n: int) -> dict[str, Any] | None:
    """Count what a request, or one picture of it, used; None when its model has left the repository since."""
    try:
        model = context.catalog.find(record.model, unloaded_too=True)
    except UnknownModel:
        return None
    return count_usage(model, record.prompt, record.width, record.height, n)


async def _content(
    context: Context, record: RequestRecord, picture: Picture, address_of: AddressOf
) -> dict[str, Any]:
    if record.response_format == "url":
        return {"url": address_of(picture.outcome.file)}
    return {"b64_json": await _base64(context, picture)}


async def _base64(context: Context, picture: Picture) -> str:
    name, data = picture.outcome.file, picture.data
    if data is None:
        data = await context.results.get(name)
    if data is None:
        raise ResultNotFound(f"the picture {name!r} is no longer in the result store: draw it again")
    return base64.b64encode(data).decode()
