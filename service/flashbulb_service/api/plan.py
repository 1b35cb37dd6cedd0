"""From a body to jobs: every decision about a request that is made before it is queued, as pure functions."""

import hashlib
import json
import secrets
from dataclasses import dataclass, field

from flashbulb_service.api.identity import Caller
from flashbulb_service.api.schemas import IGNORED, DrawRequest, ImagesRequest, JobRequest
from flashbulb_service.catalog import Catalog, Model, choose_size, exporter_times, row_tokens
from flashbulb_service.errors import InvalidRequest
from flashbulb_service.jobs import NewJob
from flashbulb_service.observability import current_request_id
from flashbulb_service.queue import Kept
from flashbulb_service.scheduler import LONG, bucket_name, choose_lane, count_tokens
from flashbulb_service.settings import Settings
from flashbulb_service.tasks import ImageTask, RequestRecord
from flashbulb_service.tracing import current_traceparent
from flashbulb_service.webhooks import parse_target

PRIORITY_MS = 6_000  # of work, for one step of priority
QUALITY_STEPS = {"low": 1, "standard": 1, "medium": 2, "hd": 4, "high": 4, "xhigh": 8, "max": 1000}


@dataclass(frozen=True)
class Plan:
    """A request that can be queued."""

    jobs: tuple[NewJob, ...]
    record: RequestRecord
    warnings: tuple[str, ...] = field(default=())


def make_plan(body: ImagesRequest, catalog: Catalog, caller: Caller, settings: Settings) -> Plan:
    """Check what the schema alone cannot, and make one job per picture.

    Raises:
        InvalidRequest: with the field's name and a code.
        UnknownModel: there is none of that name.
    """
    check_words(body, settings.max_prompt_chars)
    _check_values(body)
    model = catalog.find(body.model, task="text-to-image")
    check_guidance(body, model)
    width, height = _choose_size(body, model)
    manifest = model.bundle.manifest
    steps = choose_steps(body, manifest.offered_steps, len(manifest.time_steps))
    record = RequestRecord(
        task="text-to-image",
        model=model.id,
        prompt=body.prompt,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        n=body.n,
        width=width,
        height=height,
        steps=steps,
        response_format=body.response_format,
        image_format=body.output_format,
        quality=body.quality,
        metadata=body.metadata,
        webhook_url=body.webhook_url,
        webhook_events=body.webhook_events,
    )
    return Plan(_jobs(body, model, record, caller, settings), record, _warnings(body, model, record))


def check_webhook(body: DrawRequest, settings: Settings) -> None:
    """Refuse a webhook that could not be signed or may not be called.

    Raises:
        InvalidRequest: there is no secret, or the address is not usable.
    """
    if body.webhook_url is None:
        return
    if settings.webhook_secret is None:
        raise InvalidRequest(
            "webhook_url: this server has no secret to sign with: set FLASHBULB_WEBHOOK_SECRET, or leave it out",
            param="webhook_url",
            code="unsupported_value",
        )
    parse_target(body.webhook_url, allow_private=settings.webhook_allow_private)


def body_digest(body: DrawRequest, route: str | None) -> str:
    """Hash what the client asked for, and on which route; its key and what is ignored are no part of that.

    None is the images route. It is not named, for keys outlive an upgrade, and the version before named none; it did
    hash what is ignored, so keys of bodies that have such fields do not.
    What is ignored may be anything, also what no JSON can be made of again.
    """
    asked = body.model_dump(mode="json", exclude_unset=True, exclude={"idempotency_key", *IGNORED})
    if route is not None:
        asked["route"] = route
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def keep(record: RequestRecord, caller: Caller, *, lists: tuple[str, ...], events: bool) -> Kept:
    """Say what the queue keeps of the request as a whole."""
    return Kept(
        record.to_bytes(), caller.owner, lists=lists, events=events, hook=record.webhook_url is not None
    )


def check_steps(steps: int, offered: tuple[int, ...]) -> int:
    """Return the wanted number of steps.

    Raises:
        InvalidRequest: the student does not offer the number.
    """
    if steps not in offered:
        numbers = ", ".join(map(str, offered))
        raise InvalidRequest(
            f"steps: expected a number that the student was trained for ({numbers}), got {steps}",
            param="steps",
            code="unsupported_value",
        )
    return steps


def choose_steps(body: ImagesRequest, offered: tuple[int, ...], own: int) -> int:
    """Return the wanted number of steps, else the quality's as far as the student goes, else the student's own.

    Raises:
        InvalidRequest: the student does not offer the number.
    """
    if body.steps is not None:
        return check_steps(body.steps, offered)
    if body.quality == "auto":
        return own
    reachable = [steps for steps in offered if steps <= QUALITY_STEPS[body.quality]]
    return reachable[-1] if reachable else offered[0]


def _jobs(
    body: ImagesRequest, model: Model, record: RequestRecord, caller: Caller, settings: Settings
) -> tuple[NewJob, ...]:
    def task(index: int) -> ImageTask:
        return ImageTask(
            prompt=body.prompt,
            seed=record.seed,
            index=index,
            width=record.width,
            height=record.height,
            steps=record.steps,
            partial_images=min(body.partial_images, record.steps - 1),
            bundle_sha256=model.bundle.sha256,
            image_format=body.output_format,
            quality=body.output_compression,
            request_id=current_request_id(),
            traceparent=current_traceparent(),
        )

    return tuple(make_job(body, model, task(index), caller, settings) for index in range(body.n))


def make_job(body: DrawRequest, model: Model, task: ImageTask, caller: Caller, settings: Settings) -> NewJob:
    """Make the job of one picture or video."""
    manifest = model.bundle.manifest
    steps = task.steps or len(manifest.time_steps)
    lane = choose_lane(manifest.task, exporter_times(manifest, settings.backend))
    slo_s = settings.slo_long_s if lane == LONG else settings.slo_s
    tokens = count_tokens(task.width, task.height, task.frames, steps)
    return NewJob(
        model=model.id,
        bucket=bucket_name(model.id, task.width, task.height, steps, lane, frames=task.frames),
        payload=task.to_bytes(),
        tenant=caller.tenant,
        cost=tokens / min(row_tokens(manifest)),
        weight=caller.weight,
        priority_ms=body.priority * PRIORITY_MS,
        deadline_s=slo_s if body.deadline_ms is None else body.deadline_ms / 1000,
        wire=task.wire,
    )


def check_words(body: DrawRequest, max_chars: int) -> None:
    """Refuse a prompt of blanks or of too many characters, and a negative prompt.

    Raises:
        InvalidRequest: it is one of these.
    """
    prompt = body.prompt
    if not prompt.strip():
        raise InvalidRequest("prompt: expected words, got only blanks", param="prompt", code="empty_string")
    if len(prompt) > max_chars:
        raise InvalidRequest(
            f"prompt: expected at most {max_chars} characters, got {len(prompt)}: shorten it",
            param="prompt",
            code="string_above_max_length",
        )
    if body.negative_prompt:
        raise InvalidRequest(
            "negative_prompt: not offered, since guidance was distilled into the student: leave it out",
            param="negative_prompt",
            code="unsupported_value",
        )


def _check_values(body: ImagesRequest) -> None:
    if body.output_format == "png" and body.output_compression != 100:
        raise InvalidRequest(
            "output_compression: png is lossless; expected 100 or output_format 'jpeg' or 'webp', "
            f"got {body.output_compression}",
            param="output_compression",
            code="invalid_value",
        )
    if body.background == "transparent":
        raise InvalidRequest(
            "background: expected 'auto' or 'opaque', since no student here draws transparency",
            param="background",
            code="unsupported_value",
        )


def check_guidance(body: DrawRequest, model: Model) -> None:
    """Refuse another guidance scale than the one that the student has learnt.

    Raises:
        InvalidRequest: it is another one.
    """
    guidance = model.bundle.manifest.guidance
    if body.guidance_scale is not None and body.guidance_scale != guidance.scale:
        raise InvalidRequest(
            f"guidance_scale: {model.id} has {guidance.scale:g} baked in: expected that or none, "
            f"got {body.guidance_scale:g}",
            param="guidance_scale",
            code="unsupported_value",
        )


def _choose_size(body: ImagesRequest, model: Model) -> tuple[int, int]:
    if body.size_policy == "exact":
        return choose_size(model, body.size)
    wanted = _parse_size(body.size)
    if wanted is None:
        return choose_size(model, body.size)
    return min(model.sizes, key=lambda offered: _distance(offered, wanted))


def _parse_size(text: str) -> tuple[int, int] | None:
    width, _, height = text.partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        return None
    sides = int(width[:6]), int(height[:6])
    return sides if min(sides) > 0 else None


def _distance(offered: tuple[int, int], wanted: tuple[int, int]) -> float:
    """Tell how far a size is from another, in relative width and height."""
    return sum(max(a / b, b / a) for a, b in zip(offered, wanted, strict=True))


def _warnings(body: ImagesRequest, model: Model, record: RequestRecord) -> tuple[str, ...]:
    ignored = set(body.ignored)
    if body.quality != "auto" and len(model.bundle.manifest.offered_steps) == 1:
        ignored.add("quality")
    if body.partial_images and (record.steps == 1 or not (body.stream or isinstance(body, JobRequest))):
        ignored.add("partial_images")
    warnings = [f"ignored: {', '.join(sorted(ignored))}"] if ignored else []
    if body.size not in ("auto", record.size):
        warnings.append(f"size: {record.size} is the nearest that is offered")
    return tuple(warnings)
