"""From a body to a video job: what the student offers of sizes, lengths and rates. Pure functions."""

import math
import secrets
from collections.abc import Iterable, Sequence

from flashbulb_distill.bundle import Manifest, Shape
from flashbulb_service.api.identity import Caller
from flashbulb_service.api.plan import Plan, check_guidance, check_steps, check_words, make_job
from flashbulb_service.api.schemas import VideosRequest
from flashbulb_service.catalog import Catalog, Model, choose_size
from flashbulb_service.errors import InvalidRequest
from flashbulb_service.observability import current_request_id
from flashbulb_service.settings import Settings
from flashbulb_service.tasks import ImageTask, RequestRecord
from flashbulb_service.tracing import current_traceparent

WIRE = 2  # the version since which workers make videos
ROUNDING_S = 0.25  # "6" means 6.125 seconds, where that is offered


def make_video_plan(
    body: VideosRequest,
    catalog: Catalog,
    caller: Caller,
    settings: Settings,
    *,
    remixed_from: str | None = None,
) -> Plan:
    """Check what the schema alone cannot, and make the job.

    Raises:
        InvalidRequest: with the field's name and a code; says what is offered.
        UnknownModel: there is none of that name.
    """
    check_words(body, settings.max_prompt_chars)
    model = catalog.find(body.model, task="text-to-video")
    check_guidance(body, model)
    if body.input_reference is not None:
        raise InvalidRequest(
            f"input_reference: {model.id} makes videos from words alone: leave it out",
            param="input_reference",
            code="unsupported_value",
        )
    manifest = model.bundle.manifest
    shape = choose_shape(body, model)
    own = len(manifest.time_steps)
    steps = own if body.steps is None else check_steps(body.steps, manifest.offered_steps)
    seed = secrets.randbits(63) if body.seed is None else body.seed
    record = RequestRecord(
        wire=WIRE,
        task="text-to-video",
        model=model.id,
        prompt=body.prompt,
        seed=seed,
        n=1,
        width=shape.width,
        height=shape.height,
        frames=shape.frames,
        fps=manifest.fps,
        steps=steps,
        response_format="url",
        image_format="mp4",
        quality="auto",
        metadata=body.metadata,
        webhook_url=body.webhook_url,
        webhook_events=body.webhook_events,
        remixed_from=remixed_from,
    )
    task = ImageTask(
        wire=WIRE,
        prompt=body.prompt,
        seed=seed,
        index=0,
        width=shape.width,
        height=shape.height,
        frames=shape.frames,
        fps=manifest.fps,
        steps=steps,
        bundle_sha256=model.bundle.sha256,
        image_format="mp4",
        request_id=current_request_id(),
        traceparent=current_traceparent(),
    )
    return Plan((make_job(body, model, task, caller, settings),), record)


def choose_shape(body: VideosRequest, model: Model) -> Shape:
    """Return the first offered shape that is what is asked for.

    Raises:
        InvalidRequest: none is; names the first field that no shape fulfils, and what is offered instead.
    """
    manifest = model.bundle.manifest
    fps = offered_fps(manifest)
    shapes = list(manifest.shapes)
    if body.size != "auto":
        size = choose_size(model, body.size)
        shapes = [shape for shape in shapes if (shape.width, shape.height) == size]
    if body.fps is not None and not math.isclose(body.fps, fps, rel_tol=1e-6):
        raise _not_offered("fps", model, [f"{fps:g}"], f"{body.fps:g}")
    if body.num_frames is not None:
        offered = [str(shape.frames) for shape in shapes]
        shapes = [shape for shape in shapes if shape.frames == body.num_frames]
        if not shapes:
            raise _not_offered("num_frames", model, offered, str(body.num_frames))
    if body.seconds is not None:
        offered = [f"{shape.frames / fps:g}" for shape in shapes]
        wanted = _seconds(body.seconds)
        shapes = [shape for shape in shapes if wanted is not None and _lasts(shape.frames / fps, wanted)]
        if not shapes:
            raise _not_offered("seconds", model, offered, repr(body.seconds)[:40])
    return shapes[0]


def offered_fps(manifest: Manifest) -> float:
    """Return the rate of a student of videos."""
    assert manifest.fps is not None  # the manifest's own rule
    return manifest.fps


def offered_seconds(manifest: Manifest) -> list[str]:
    """Return the lengths that a student offers, as OpenAI writes them."""
    fps = offered_fps(manifest)
    return list(dict.fromkeys(f"{shape.frames / fps:g}" for shape in manifest.shapes))


def _seconds(given: str | int | float) -> float | None:
    try:
        seconds = float(given)
    except (ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) else None


def _lasts(seconds: float, wanted: float) -> bool:
    """Tell whether a length is the one that is asked for, exactly or as a whole number of seconds."""
    near = ROUNDING_S if wanted == round(wanted) >= 1 else 0.0
    return abs(seconds - wanted) <= max(near, 1e-3)


def _not_offered(param: str, model: Model, offered: Iterable[str], given: str) -> InvalidRequest:
    values: Sequence[str] = list(dict.fromkeys(offered))
    return InvalidRequest(
        f"{param}: {model.id} offers {', '.join(values)}, got {given}: send one of these, or leave it out",
        param=param,
        code="unsupported_value",
    )
