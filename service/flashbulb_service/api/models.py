"""GET /v1/models: what can be asked for."""

import contextlib
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from flashbulb_service.api.context import Context, Shared
from flashbulb_service.api.schemas import ERRORS
from flashbulb_service.api.video_plan import offered_seconds
from flashbulb_service.catalog import Catalog, Model
from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.presence import LiveWorker, backends_of

router = APIRouter(responses=ERRORS)


@router.get("/v1/models", summary="The models that can be asked for")
async def list_models(context: Shared) -> dict[str, Any]:
    """List the newest version of every model; older ones are found by name@version."""
    workers = await _workers(context)
    data = [describe_model(context.catalog, model, workers) for model in context.catalog.newest()]
    return {"object": "list", "data": data}


@router.get("/v1/models/{model}", summary="One model by name, name@version or alias")
async def get_model(model: str, context: Shared) -> dict[str, Any]:
    """Describe one model."""
    return describe_model(context.catalog, context.catalog.find(model), await _workers(context))


async def _workers(context: Context) -> list[LiveWorker]:
    with contextlib.suppress(QueueUnavailable):  # what can be asked for is known without the queue
        return await context.presence.workers()
    return []


def describe_model(catalog: Catalog, model: Model, workers: Sequence[LiveWorker]) -> dict[str, Any]:
    """Describe a model in OpenAI's four keys, and what a client needs to know beside them."""
    manifest = model.bundle.manifest
    video: dict[str, Any] = {}
    if manifest.is_video:
        frames = dict.fromkeys(shape.frames for shape in manifest.shapes)
        video = {"fps": manifest.fps, "num_frames": [*frames], "seconds": offered_seconds(manifest)}
    return {
        "id": model.name,
        "object": "model",
        "created": int((model.bundle.path / "manifest.json").stat().st_mtime),
        "owned_by": "flashbulb",
        "version": model.version,
        "aliases": catalog.aliases_of(model),
        "task": manifest.task,
        "sizes": [f"{width}x{height}" for width, height in model.sizes],
        **video,
        "num_steps": len(manifest.time_steps),
        "steps": list(manifest.offered_steps),
        "backends": backends_of(workers, model.id),
        "licence": manifest.licence,
        "attribution": manifest.attribution,
        "sha256": model.bundle.sha256,
    }
