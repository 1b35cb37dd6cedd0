"""/v1/videos: videos as jobs, in the shape that OpenAI's client expects."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from flashbulb_service.api.context import Context, Shared
from flashbulb_service.api.errors import ResultNotFound, VideoNotFound, first_problem
from flashbulb_service.api.forms import BODY, Form, read_form
from flashbulb_service.api.identity import caller_of, list_of, owner_of
from flashbulb_service.api.images import (
    IdempotencyHeader,
    RetryHeader,
    address_of,
    answer_headers,
    choose_key,
    enqueue,
)
from flashbulb_service.api.jobs import describe_job, lead_of, page_of
from flashbulb_service.api.media import expect_json
from flashbulb_service.api.ranges import parse_range
from flashbulb_service.api.schemas import ERRORS, RemixRequest, VideosRequest
from flashbulb_service.api.video_plan import make_video_plan
from flashbulb_service.errors import InvalidRequest, JobNotFound
from flashbulb_service.eta import poll_after_ms
from flashbulb_service.formats import VideoVariant
from flashbulb_service.queue import RequestView
from flashbulb_service.results import media_type, video_file
from flashbulb_service.tasks import RequestRecord

router = APIRouter(responses=ERRORS)

TASK: Final = "text-to-video"

VARIANTS: tuple[VideoVariant, ...] = ("video", "thumbnail", "spritesheet")
OBJECT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The video", "content": {"application/json": {"schema": {"type": "object"}}}}
}
_SCHEMA = {"schema": VideosRequest.model_json_schema()}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": _SCHEMA, "multipart/form-data": _SCHEMA},
    }
}
_CONTENT: dict[str, Any] = {media: {} for media in ("video/mp4", "image/webp")}


@router.post("/v1/videos", summary="Make a video", openapi_extra=_BODY, responses=OBJECT)
async def create_video(
    request: Request,
    context: Shared,
    idempotency_key: IdempotencyHeader = None,
    retry_count: RetryHeader = None,
) -> JSONResponse:
    """Queue a video and return at once; `openai-poll-after-ms` says when it pays to ask for it."""
    body = _checked(await read_form(request, max_files=1))
    return await _create(request, context, body, idempotency_key, retry_count)


@router.get("/v1/videos", summary="The caller's videos, newest first", responses=OBJECT)
async def list_videos(
    request: Request,
    context: Shared,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=0, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """List videos from behind the video `after`."""
    behind = None if after is None else _lead_of(after)
    try:
        found = await context.queue.requests(
            list_of(owner_of(request), TASK), after=behind, limit=limit + 1, newest_first=order == "desc"
        )
    except JobNotFound as error:
        raise VideoNotFound(f"after: no video {after!r} in your list: list without it") from error
    videos = []
    for view in found[:limit]:
        try:
            videos.append(await _describe(context, request, view))
        except JobNotFound:
            continue  # its time ended meanwhile
    return page_of(videos, has_more=len(found) > limit)


@router.post("/v1/videos/edits", summary="Change a video (no student here does)", openapi_extra=BODY)
@router.post("/v1/videos/extensions", summary="Continue a video (no student here does)", openapi_extra=BODY)
@router.post("/v1/videos/characters", summary="Keep a character (no student here does)", openapi_extra=BODY)
async def refuse_video_input(context: Shared) -> None:
    """Say that no model of this server takes a video."""
    model = context.catalog.find(None, task=TASK)
    raise InvalidRequest(
        f"{model.id} makes videos from words alone: it takes no video; POST /v1/videos makes one, "
        "POST /v1/videos/{id}/remix makes it again with another prompt",
        code="unsupported_task",
    )


@router.get("/v1/videos/{video_id}", summary="One video", responses=OBJECT)
async def get_video(request: Request, video_id: str, context: Shared) -> JSONResponse:
    """Describe a video: its status and progress; `openai-poll-after-ms` says when it pays to ask again."""
    return await _answer(context, request, await _owned(context, request, video_id))


@router.delete("/v1/videos/{video_id}", summary="Delete a video", responses=OBJECT)
async def delete_video(request: Request, video_id: str, context: Shared) -> dict[str, Any]:
    """Delete a video and its files. One that is being made is cancelled, and leaves the device after its step."""
    view = await _owned(context, request, video_id)
    await context.queue.forget(view, [list_of(view.owner, TASK)])
    await context.results.delete([video_file(view.id, variant) for variant in VARIANTS])
    return {"id": f"video_{view.id}", "object": "video.deleted", "deleted": True}


@router.get(
    "/v1/videos/{video_id}/content",
    summary="The file of a video, or of its thumbnail or spritesheet",
    response_class=Response,
    responses={
        200: {"description": "The file", "content": _CONTENT},
        206: {"description": "The part of the file that was asked for", "content": _CONTENT},
    },
)
async def get_content(
    request: Request,
    video_id: str,
    context: Shared,
    variant: VideoVariant = "video",
    range_header: Annotated[str | None, Header(alias="range")] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> Response:
    """Serve a file of a finished video, or a part of it (Range)."""
    view = await _owned(context, request, video_id)
    name = video_file(view.id, variant)
    size = await context.results.size(name) if await _is_done(context, request, view) else None
    if size is None:
        raise ResultNotFound(f"the file of {video_id} is no longer in the result store: make the video again")
    tag = f'"{name}"'  # a file never changes
    headers = {
        "accept-ranges": "bytes",
        "etag": tag,
        "cache-control": "private, max-age=86400, immutable",
        "content-disposition": f'inline; filename="{name}"',
    }
    part = parse_range(range_header, size) if if_range in (None, tag) else None
    start, end = part or (0, size)
    data = await context.results.get_part(name, start, end)
    if data is None:
        raise ResultNotFound(f"the file of {video_id} has just left the result store: make the video again")
    if part:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    return Response(data, 206 if part else 200, headers, media_type(name))


@router.post(
    "/v1/videos/{video_id}/remix",
    summary="The same video with another prompt",
    dependencies=[Depends(expect_json)],
    responses=OBJECT,
)
async def remix_video(
    request: Request,
    video_id: str,
    body: RemixRequest,
    context: Shared,
    idempotency_key: IdempotencyHeader = None,
    retry_count: RetryHeader = None,
) -> JSONResponse:
    """Make a video of the same model, size, length, steps and noise from other words."""
    view = await _owned(context, request, video_id)
    first = RequestRecord.from_bytes(view.record)
    again = VideosRequest(
        prompt=body.prompt,
        model=first.model,
        size=first.size,
        num_frames=first.frames,
        steps=first.steps,
        seed=first.seed,
        metadata=first.metadata,
    )
    return await _create(request, context, again, idempotency_key, retry_count, remixed_from=view.id)


def _checked(form: Form) -> VideosRequest:
    for name, _ in form.files:
        if name != "input_reference":
            raise InvalidRequest(
                f"{name[:64]}: expected text, got a file", param=name[:64], code="invalid_type"
            )
        form.fields[name] = "a file"
    try:
        return VideosRequest.model_validate(form.fields)
    except ValidationError as error:
        raise first_problem(error.errors(), VideosRequest.model_fields) from error


async def _create(
    request: Request,
    context: Context,
    body: VideosRequest,
    idempotency_key: str | None,
    retry_count: str | None,
    *,
    remixed_from: str | None = None,
) -> JSONResponse:
    caller = caller_of(request, body)
    plan = make_video_plan(body, context.catalog, caller, context.settings, remixed_from=remixed_from)
    route = f"/v1/videos/{remixed_from}/remix" if remixed_from else "/v1/videos"
    key = choose_key(body, idempotency_key, retry_count, route=route)
    lists = (list_of(caller.owner, TASK),)
    queued = await enqueue(context, plan, body, caller, key, lists=lists, events=True, awaited=False)
    view = await _owned(context, request, f"video_{queued.ids[0]}")
    return await _answer(context, request, view, answer_headers(plan, replayed=queued.replayed))


async def _answer(
    context: Context, request: Request, view: RequestView, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    try:
        video = await _describe(context, request, view)
    except JobNotFound as error:
        raise _not_found(f"video_{view.id}") from error
    told = dict(headers or {})
    if video["status"] in ("queued", "in_progress"):
        told["openai-poll-after-ms"] = str(poll_after_ms(video["eta_ms"]))
    return JSONResponse(video, headers=told)


async def _describe(context: Context, request: Request, view: RequestView) -> dict[str, Any]:
    """Describe a video with OpenAI's keys, and ours beside them."""
    job = await describe_job(context, address_of(context, request), view)
    made = job.pop("data")
    for name in ("task", "n", "output_format", "started_at"):
        job.pop(name)
    extra = {name: made[0][name] for name in ("batch_size", "timings")} if made else {}
    return {**job, "object": "video", **extra}


async def _is_done(context: Context, request: Request, view: RequestView) -> bool:
    """Return when a video is completed.

    Raises:
        ResultNotFound: it is not; says what it is.
    """
    video = await _describe(context, request, view)
    if video["status"] == "completed":
        return True
    if video["error"]:
        told = f"failed: {video['error']['message']}"
    elif video["status"] == "cancelled":
        told = "was cancelled"
    else:
        told = f"is not ready ({video['progress']} %): ask /v1/videos/{video['id']} until it is completed"
    raise ResultNotFound(f"the video {told}")


async def _owned(context: Context, request: Request, video_id: str) -> RequestView:
    """Find a video of the caller's; one of somebody else's is not found."""
    view = await context.queue.request(_lead_of(video_id))
    if view is None or view.owner != owner_of(request) or not RequestRecord.from_bytes(view.record).fps:
        raise _not_found(video_id)
    return view


def _lead_of(video_id: str) -> str:
    try:
        return lead_of(video_id)
    except JobNotFound as error:
        raise _not_found(video_id) from error


def _not_found(video_id: str) -> VideoNotFound:
    return VideoNotFound(
        f"no video {video_id[:80]!r}: the id is wrong, or it was deleted, or its time is over"
    )
