"""/v1/jobs: requests that nobody has to wait for. A job has the id of the first of its pictures' queue jobs.

A video is a job as well, under its own id: read, cancelled and watched here, made and listed at /v1/videos.
"""

import contextlib
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from flashbulb_service.api.answers import AddressOf, finished, summarise
from flashbulb_service.api.context import Context, Shared
from flashbulb_service.api.identity import caller_of, list_of, owner_of
from flashbulb_service.api.images import Key, address_of, answer_headers, choose_key, enqueue
from flashbulb_service.api.media import expect_json
from flashbulb_service.api.partials import check_room, preview_of
from flashbulb_service.api.plan import make_plan
from flashbulb_service.api.schemas import ERRORS, JobRequest
from flashbulb_service.errors import InvalidRequest, JobNotFound, NewerMessage, UnknownModel
from flashbulb_service.eta import queued_ms, running_ms
from flashbulb_service.jobs import JobState, JobView
from flashbulb_service.queue import DueHook, Event, RequestView
from flashbulb_service.tasks import RequestRecord, StepDone
from flashbulb_service.webhooks import Message, make_body

router = APIRouter(responses=ERRORS)

HEARTBEAT_S = 5.0
_ID = re.compile(r"(?:job|video)_([0-9a-f]{32})")
_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")
OBJECT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The job", "content": {"application/json": {"schema": {"type": "object"}}}}
}


@router.post(
    "/v1/jobs",
    summary="Queue a job and return at once",
    dependencies=[Depends(expect_json)],
    responses=OBJECT,
)
async def create_job(
    request: Request,
    body: JobRequest,
    context: Shared,
    idempotency_key: Annotated[str | None, Header()] = None,
    retry_count: Annotated[
        str | None, Header(alias="x-stainless-retry-count", include_in_schema=False)
    ] = None,
) -> JSONResponse:
    """Queue one job per picture; read it, watch its events, or cancel it under its id."""
    if body.stream:
        raise InvalidRequest(
            "stream: a job is watched at /v1/jobs/{id}/events: leave it out",
            param="stream",
            code="unsupported_value",
        )
    caller = caller_of(request, body)
    plan = make_plan(body, context.catalog, caller, context.settings)
    key: Key = choose_key(body, idempotency_key, retry_count, route="/v1/jobs")
    queued = await enqueue(
        context, plan, body, caller, key, lists=(caller.owner,), events=True, awaited=False
    )
    described = await _describe(context, request, await _owned(context, request, f"job_{queued.ids[0]}"))
    return JSONResponse(described, headers=answer_headers(plan, replayed=queued.replayed))


@router.get("/v1/jobs", summary="The caller's jobs, newest first", responses=OBJECT)
async def list_jobs(
    request: Request,
    context: Shared,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    task: Literal["text-to-image", "text-to-video"] = "text-to-image",
) -> dict[str, Any]:
    """List jobs of a task from behind the job `after`."""
    listed = list_of(owner_of(request), task)
    behind = None if after is None else lead_of(after)
    found = await context.queue.requests(listed, after=behind, limit=limit + 1, newest_first=order == "desc")
    jobs = [
        described for view in found[:limit] for described in await _described_if_there(context, request, view)
    ]
    return page_of(jobs, has_more=len(found) > limit)


def page_of(described: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return one page of a list in the form of OpenAI's client."""
    return {
        "object": "list",
        "data": described,
        "first_id": described[0]["id"] if described else None,
        "last_id": described[-1]["id"] if described else None,
        "has_more": has_more,
    }


@router.get("/v1/jobs/{job_id}", summary="One job", responses=OBJECT)
async def get_job(request: Request, job_id: str, context: Shared) -> dict[str, Any]:
    """Describe a job: its status, and its pictures when they are there."""
    return await _describe(context, request, await _owned(context, request, job_id))


@router.delete("/v1/jobs/{job_id}", summary="Cancel a job", responses=OBJECT)
async def cancel_job(request: Request, job_id: str, context: Shared) -> dict[str, Any]:
    """Cancel what has not ended yet; calling it again changes nothing."""
    view = await _owned(context, request, job_id)
    for row in view.rows:
        with contextlib.suppress(JobNotFound):
            await context.queue.cancel(row)
    return await _describe(context, request, view)


async def _watched(
    request: Request,
    job_id: str,
    context: Shared,
    last_event_id: Annotated[str | None, Header()] = None,
) -> tuple[RequestView, str]:
    """Check everything about a stream before its first byte."""
    view = await _owned(context, request, job_id)
    if last_event_id is not None and not _EVENT_ID.fullmatch(last_event_id):
        raise InvalidRequest(
            "Last-Event-ID: expected the id of an event of this stream",
            param="Last-Event-ID",
            code="invalid_value",
        )
    check_room(context, view.owner)
    return view, last_event_id or "0"


@router.get("/v1/jobs/{job_id}/events", summary="What happens to a job", response_class=EventSourceResponse)
async def watch_job(
    request: Request, context: Shared, watched: Annotated[tuple[RequestView, str], Depends(_watched)]
) -> AsyncIterator[ServerSentEvent]:
    """Send the job's state, then every event; the one that ends the job ends the stream."""
    view, after = watched
    described = await _describe(context, request, view)
    yield ServerSentEvent(event="job.status", data=described)
    watching = context.queue.watch(view.id, after=after, quiet_s=HEARTBEAT_S, owner=view.owner)
    try:
        while described["status"] in ("queued", "in_progress"):
            event = await anext(watching)
            described = await _describe(context, request, view)
            if event is None:  # silence: the hash is the truth, and the position may have moved
                yield ServerSentEvent(event="job.status", data=described)
            else:
                after = event.id
                yield _as_sse(context, request, event, described)
    finally:
        await watching.aclose()
    for event in await context.queue.past_events(view.id, after=after):
        yield _as_sse(context, request, event, described)
    yield ServerSentEvent(event=f"job.{described['status']}", data=described)


def _as_sse(
    context: Context, request: Request, event: Event, described: Mapping[str, Any]
) -> ServerSentEvent:
    data = {"index": event.row, "at": event.at, **_short(described)}
    if described["task"] == "text-to-video":
        step = step_of(event.data.get("data")) if event.kind == "progress" else None
        told = {"step": step.step, "steps": step.steps} if step else event.data
        return ServerSentEvent(event=f"video.{event.kind}", id=event.id, data={**told, **data})
    preview = preview_of(event)
    if preview is None:
        return ServerSentEvent(event=f"picture.{event.kind}", id=event.id, data={**event.data, **data})
    shown = preview.model_dump(exclude={"file"})
    data |= {"url": address_of(context, request)(preview.file), **shown}
    return ServerSentEvent(event="picture.preview", id=event.id, data=data)


async def _describe(context: Context, request: Request, view: RequestView) -> dict[str, Any]:
    return await describe_job(context, address_of(context, request), view)


async def webhook_message(context: Context, hook: DueHook) -> Message | None:
    """Say what a request's webhook is to tell; None when it is gone, or its end is not of the wanted kinds."""
    view = await context.queue.request(hook.request_id)
    if view is None:
        return None
    record = RequestRecord.from_bytes(view.record)
    with contextlib.suppress(JobNotFound):
        job = await describe_job(context, lambda name: f"/v1/images/results/{name}", view)
        kind = f"job.{job['status']}"
        if record.webhook_url is not None and kind in record.webhook_events:
            message_id = f"evt_{view.id}_{hook.replays}" if hook.replays else f"evt_{view.id}"
            body = make_body(kind, job, job["completed_at"] or job["created_at"], message_id)
            return Message(record.webhook_url, message_id, body)
    return None


def _short(described: Mapping[str, Any]) -> dict[str, Any]:
    return {name: described[name] for name in ("status", "progress", "queue_position", "eta_ms")}


def lead_of(job_id: str) -> str:
    found = _ID.fullmatch(job_id)
    if found is None:
        raise JobNotFound(job_id[:80])
    return found[1]


async def _owned(context: Context, request: Request, job_id: str) -> RequestView:
    """Find a job of the caller's; one of somebody else's is not found."""
    view = await context.queue.request(lead_of(job_id))
    if view is None or view.owner != owner_of(request):
        raise JobNotFound(job_id)
    return view


async def _described_if_there(context: Context, request: Request, view: RequestView) -> list[dict[str, Any]]:
    with contextlib.suppress(JobNotFound, NewerMessage):
        return [await _describe(context, request, view)]
    return []


async def describe_job(context: Context, address_of: AddressOf, view: RequestView) -> dict[str, Any]:
    record = RequestRecord.from_bytes(view.record)
    name = f"{'video' if record.fps else 'job'}_{view.id}"
    rows = [row for row in await context.queue.views(view.rows) if row is not None]
    if len(rows) < len(view.rows):
        raise JobNotFound(name)
    status = status_of(rows)
    position = None
    if status == "queued":
        position = max([await context.queue.position(row) or 0 for row in rows])
    step = None
    if record.fps and status == "in_progress":
        step = step_of(await context.queue.last_step(rows[0].id))
    ended = [row.finished_at for row in rows if row.finished_at is not None]
    over = status not in ("queued", "in_progress")
    last = max(ended) if over and ended else None
    # A job that was replayed ends later than the others, whose files live no longer for that.
    first = min((row.finished_at for row in rows if row.result and row.finished_at), default=last)
    error = next((row.error for row in rows if row.state is JobState.FAILED and row.error), None)
    if record.fps:
        left_ms = await _video_left_ms(context, rows[0], record, position, step)
    else:
        left_ms = eta_ms(context, record, rows, position)
    described = {
        "id": name,
        "object": "job",
        "task": record.task,
        "model": record.model,
        "status": status,
        "progress": percent(rows, step),
        "queue_position": position,
        "eta_ms": None if left_ms is None else round(left_ms),
        "created_at": int(rows[0].enqueued_at),
        "started_at": _seconds(min((row.started_at for row in rows if row.started_at), default=None)),
        "completed_at": _seconds(last),
        "expires_at": _seconds(
            None if last is None or first is None else first + context.settings.results_ttl_s
        ),
        "prompt": record.prompt,
        "n": record.n,
        "size": record.size,
        "seed": record.seed,
        "output_format": record.image_format,
        "metadata": record.metadata,
        "error": None if error is None else {"code": error.code, "message": error.message},
        "data": [_picture(address_of, record, index, row) for index, row in enumerate(rows) if row.result],
    }
    if record.fps:
        described |= {
            "seconds": f"{record.seconds:g}",
            "num_frames": record.frames,
            "fps": record.fps,
            "steps": record.steps,
            "remixed_from_video_id": f"video_{record.remixed_from}" if record.remixed_from else None,
        }
    return described


def percent(rows: Sequence[JobView], step: StepDone | None) -> int:
    """Return how much of a job is done: pictures that have ended, or steps of a video; 100 only at the end."""
    if step is not None:
        return min(99, 100 * step.step // step.steps)
    return round(100 * sum(row.state.is_terminal for row in rows) / len(rows))


def step_of(told: str | None) -> StepDone | None:
    """Read what a worker told of a step; None when it told nothing, or something else."""
    if told is not None:
        with contextlib.suppress(ValueError):
            return StepDone.from_bytes(told.encode())
    return None


async def _video_left_ms(
    context: Context, row: JobView, record: RequestRecord, position: int | None, step: StepDone | None
) -> float | None:
    """Tell in how many milliseconds a video should be done; None when that is unknown, or it has ended."""
    if row.state.is_terminal:
        return None
    now, known = await context.queue.known_times(row.model, row.bucket)
    if position is not None or row.started_at is None:
        return queued_ms(known, position or 0)
    return running_ms(known, (now - row.started_at) * 1000, step.step if step else 0, record.steps)


def status_of(rows: Sequence[JobView]) -> str:
    """Return a job's status from those of its pictures: one failure is the job's, when all have ended."""
    states = {row.state for row in rows}
    if not all(state.is_terminal for state in states):
        waiting = states <= {JobState.QUEUED, JobState.DELAYED}
        return "queued" if waiting else "in_progress"
    for state, status in ((JobState.FAILED, "failed"), (JobState.CANCELLED, "cancelled")):
        if state in states:
            return status
    return "completed"


def eta_ms(
    context: Context, record: RequestRecord, rows: Sequence[JobView], position: int | None
) -> int | None:
    """Tell in how many milliseconds a queued job should be done, by the bundle's calibration; None if unknown."""
    try:
        manifest = context.catalog.find(record.model, unloaded_too=True).bundle.manifest
    except UnknownModel:  # it has left the repository
        return None
    measured = [ms / size for table in manifest.calibration.values() for size, ms in table.items()]
    if position is None or not measured:
        return None
    return round(min(measured) * (position + len(rows)))


def _picture(address_of: AddressOf, record: RequestRecord, index: int, row: JobView) -> dict[str, Any]:
    picture = finished(row)
    return {
        "url": address_of(picture.outcome.file),
        "seed": record.seed,
        "index": index,
        "batch_size": picture.outcome.batch_size,
        "timings": summarise([picture]),
    }


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
