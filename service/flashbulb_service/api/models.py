"""GET /v1/models: what can be asked for."""

from typing import Any

from fastapi import APIRouter

from flashbulb_service.api.context import Shared
from flashbulb_service.api.schemas import ERRORS
from flashbulb_service.catalog import Catalog, Model

router = APIRouter(responses=ERRORS)


@router.get("/v1/models", summary="The models that can be asked for")
async def list_models(context: Shared) -> dict[str, Any]:
    """List the newest version of every model; older ones are found by name@version."""
    return {
        "object": "list",
        "data": [describe_model(context.catalog, model) for model in context.catalog.newest()],
    }


@router.get("/v1/models/{model}", summary="One model by name, name@version or alias")
async def get_model(model: str, context: Shared) -> dict[str, Any]:
    """Describe one model."""
    return describe_model(context.catalog, context.catalog.find(model))


def describe_model(catalog: Catalog, model: Model) -> dict[str, Any]:
    """Describe a model in OpenAI's four keys, and what a client needs to know beside them."""
    manifest = model.bundle.manifest
    return {
        "id": model.name,
        "object": "model",
        "created": int((model.bundle.path / "manifest.json").stat().st_mtime),
        "owned_by": "flashbulb",
        "version": model.version,
        "aliases": catalog.aliases_of(model),
        "task": manifest.task,
        "sizes": [f"{width}x{height}" for width, height in model.sizes],
        "num_steps": len(manifest.time_steps),
        "steps": list(manifest.offered_steps),
        "licence": manifest.licence,
        "attribution": manifest.attribution,
        "sha256": model.bundle.sha256,
    }
