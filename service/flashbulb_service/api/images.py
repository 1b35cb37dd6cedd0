"""POST /v1/images/generations, and the pictures it makes."""

import asyncio
import base64
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response

from flashbulb_service.api.context import Context, Shared
from flashbulb_service.api.errors import ClientGone, RequestTimeout, ResultNotFound
from flashbulb_service.api.schemas import REFUSED, ImagesRequest
from flashbulb_service.catalog import Model, choose_size
from flashbulb_service.errors import (
    InvalidRequest,
    JobCancelled,
    JobFailed,
    JobNotFound,
    QueueUnavailable,
)
from flashbulb_service.jobs import JobState, JobView, NewJob
from flashbulb_service.observability import current_request_id
from flashbulb_service.receipts import make_receipt
from flashbulb_service.results import media_type
from flashbulb_service.safety import check_prompt
from flashbulb_service.scheduler import bucket_name
from flashbulb_service.tasks import MAX_SEED, ImageOutcome, ImageTask

log = logging.getLogger(__name__)
router = APIRouter()

MAX_KEY_CHARS = 200


@router.post("/v1/images/generations", summary="Draw pictures from a prompt")
async def generate_images(
    request: Request,
    body: ImagesRequest,
    context: Shared,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Queue one job per picture, wait for all of them, and answer as OpenAI does."""
    start = time.monotonic()
    check_request(body, idempotency_key, max_prompt_chars=context.settings.max_prompt_chars)
    check_prompt(context.words, body.prompt)
    model = context.catalog.find(body.model)
    width, height = choose_size(model, body.size)
    seed = choose_seed(body.seed, idempotency_key)
    jobs = plan_jobs(body, model, width, height, seed)
    enqueued = await context.queue.enqueue(
        jobs, idempotency_key=idempotency_key, request_digest=body.model_dump_json()
    )
    views = await _wait(context, request, enqueued.ids, keep=idempotency_key is not None)
    pictures = [finished(view) for view in views]
    timings = summarise(pictures, total_ms=(time.monotonic() - start) * 1000)
    context.metrics.answered(model.id, overhead_ms(pictures, timings["total_ms"]) / 1000)
    receipt = make_receipt(model.id, [picture.outcome for picture in pictures], timings)
    return JSONResponse(
        {
            "created": int(views[0].enqueued_at),
            "data": [
                {**await _content(context, request, body, picture), "seed": seed, "index": index}
                for index, picture in enumerate(pictures)
            ],
            "model": model.id,
            "size": f"{width}x{height}",
            "output_format": body.output_format,
            "timings": timings,
            "batch_size": receipt.batch_size,
            "receipt": receipt.body(),
        },
        headers={**receipt.headers(), **_warning(body)},
    )


@router.get("/v1/images/results/{name}", summary="A picture by the address that response_format=url gave")
async def get_result(name: str, context: Shared) -> Response:
    """Serve a picture from the result store until its time is over."""
    data = await context.results.get(name)
    if data is None:
        raise ResultNotFound(f"no picture {name!r}: the name is wrong, or its time is over; draw it again")
    # The name is random and its bytes never change: whoever has it may keep it.
    return Response(
        data, media_type=media_type(name), headers={"cache-control": "private, max-age=86400, immutable"}
    )


def check_request(body: ImagesRequest, idempotency_key: str | None, *, max_prompt_chars: int) -> None:
    """Refuse what the schema alone cannot.

    Raises:
        InvalidRequest: with the field's name and a code.
    """
    if not body.prompt.strip():
        raise InvalidRequest("prompt: expected words, got only blanks", param="prompt", code="empty_string")
    if len(body.prompt) > max_prompt_chars:
        raise InvalidRequest(
            f"prompt: expected at most {max_prompt_chars} characters, got {len(body.prompt)}: shorten it",
            param="prompt",
            code="string_above_max_length",
        )
    if body.output_format == "png" and body.output_compression != 100:
        raise InvalidRequest(
            "output_compression: png is lossless; expected 100 or output_format 'jpeg' or 'webp', "
            f"got {body.output_compression}",
            param="output_compression",
            code="invalid_value",
        )
    for name, values in REFUSED.items():
        if getattr(body, name) in values:
            raise InvalidRequest(
                f"{name}: {getattr(body, name)!r} is not offered here: leave it out",
                param=name,
                code="unsupported_value",
            )
    if idempotency_key is not None and not 0 < len(idempotency_key) <= MAX_KEY_CHARS:
        raise InvalidRequest(
            f"Idempotency-Key: expected 1 to {MAX_KEY_CHARS} characters, got {len(idempotency_key)}",
            param="Idempotency-Key",
            code="invalid_value",
        )


def choose_seed(wanted: int | None, idempotency_key: str | None) -> int:
    """Return the wanted seed, else one from the idempotency key (equal pictures), else a random one."""
    if wanted is not None:
        return wanted
    if idempotency_key is not None:
        return int.from_bytes(hashlib.sha256(idempotency_key.encode()).digest()[:8], "big") & MAX_SEED
    return secrets.randbits(63)


def plan_jobs(body: ImagesRequest, model: Model, width: int, height: int, seed: int) -> list[NewJob]:
    """Make one job per picture; they share a bucket, and may still run in different batches."""
    manifest = model.bundle.manifest
    smallest = min(w * h for w, h in model.sizes)
    return [
        NewJob(
            model=model.id,
            bucket=bucket_name(model.id, width, height, len(manifest.time_steps)),
            payload=ImageTask(
                prompt=body.prompt,
                seed=seed,
                index=index,
                width=width,
                height=height,
                image_format=body.output_format,
                quality=body.output_compression,
                request_id=current_request_id(),
            ).to_bytes(),
            tenant=tenant_of(body),
            cost=width * height / smallest,
        )
        for index in range(body.n)
    ]


def tenant_of(body: ImagesRequest) -> str:
    """Return whose share of the machine a request uses: its end user, when the client names one."""
    user = body.safety_identifier or body.user
    return f"user-{hashlib.sha256(user.encode()).hexdigest()[:16]}" if user else "default"


@dataclass(frozen=True)
class Picture:
    """A finished job: where its picture lies, and how long it waited."""

    outcome: ImageOutcome
    queue_ms: float


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
    return Picture(ImageOutcome.from_bytes(view.result), max(0.0, waited_s * 1000))


def summarise(pictures: Sequence[Picture], *, total_ms: float) -> dict[str, float]:
    """Tell where a request's time went: of each part, the slowest picture's, in milliseconds."""
    timings = {
        "queue_ms": max(picture.queue_ms for picture in pictures),
        "batch_ms": max(picture.outcome.batch_ms for picture in pictures),
        "encode_ms": max(picture.outcome.encode_ms for picture in pictures),
        "total_ms": total_ms,
    }
    return {name: round(value, 3) for name, value in timings.items()}


def overhead_ms(pictures: Sequence[Picture], total_ms: float) -> float:
    """Return what of a request's time was neither waiting, drawing nor encoding of its slowest picture."""
    return total_ms - max(p.queue_ms + p.outcome.batch_ms + p.outcome.encode_ms for p in pictures)


async def _wait(context: Context, request: Request, ids: Sequence[str], *, keep: bool) -> list[JobView]:
    """Wait for jobs as long as the client does; cancel them when nobody will read them.

    With `keep` (an idempotency key) the client may come back for them, so they run on.
    """
    timeout_s = context.settings.request_timeout_s
    waiting = asyncio.create_task(context.queue.wait(ids, timeout_s))
    leaving = asyncio.create_task(_disconnect(request))
    answered = False
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGone("the client closed the connection before its pictures were ready")
        views = waiting.result()
        answered = True
        return views
    except TimeoutError as error:
        raise RequestTimeout(f"expected the pictures within {timeout_s:.0f} s: try again later") from error
    finally:
        waiting.cancel()
        leaving.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)
        if not answered and not keep:
            await _abandon(context, ids)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass  # the rest of the body


async def _abandon(context: Context, ids: Sequence[str]) -> None:
    for job_id in ids:
        with contextlib.suppress(JobNotFound, QueueUnavailable):
            if await context.queue.cancel(job_id):
                context.metrics.abandoned.inc()
    log.info("abandoned %d jobs whose client left", len(ids))


async def _content(
    context: Context, request: Request, body: ImagesRequest, picture: Picture
) -> dict[str, Any]:
    name = picture.outcome.file
    if body.response_format == "url":
        return {"url": str(request.url_for("get_result", name=name))}
    data = await context.results.get(name)
    if data is None:
        raise ResultNotFound(f"the picture {name!r} is no longer in the result store: draw it again")
    return {"b64_json": base64.b64encode(data).decode()}


def _warning(body: ImagesRequest) -> dict[str, str]:
    return {"x-flashbulb-warning": f"ignored: {', '.join(body.ignored)}"} if body.ignored else {}
