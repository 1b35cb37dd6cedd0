"""/v1/admin/models and /v1/admin/aliases: what workers serve and have in memory, and what models are called."""

import logging
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi import Path as PathParameter
from pydantic import BaseModel, ConfigDict, Field

from flashbulb_service.api.context import Context, Shared
from flashbulb_service.api.media import expect_json
from flashbulb_service.api.schemas import ERRORS
from flashbulb_service.catalog import Model
from flashbulb_service.errors import InvalidRequest, UnknownModel
from flashbulb_service.model_book import ModelBook
from flashbulb_service.presence import LiveWorker, backends_of

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/admin", responses=ERRORS, tags=["admin"])

Alias = Annotated[str, PathParameter(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class AliasRequest(BaseModel):
    """What an alias leads to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, max_length=200)


@router.get("/models", summary="All models and versions, and where they are in memory")
async def list_admin_models(context: Shared) -> dict[str, Any]:
    """List every version of the repository that was ever offered, unloaded ones among them."""
    workers = await context.presence.workers()
    memory = await context.presence.memory(workers)
    data = [_describe(context, model, workers, memory) for model in context.catalog.models]
    return {"object": "list", "data": data, "aliases": dict((await ModelBook(context.queue).read()).aliases)}


@router.post("/models/{model}/{action}", summary="Load or unload a model on all workers")
async def set_residence(model: str, action: Literal["load", "unload"], context: Shared) -> dict[str, Any]:
    """Load: serve it, and have it in memory. Unload: serve it no longer; `name` then means the newest other version."""
    found = context.catalog.find(model, unloaded_too=True)
    book = ModelBook(context.queue)
    await (book.load(found.id) if action == "load" else book.unload(found.id))
    await follow_words(context)
    log.info("model %s: %s", found.id, action)
    workers = await context.presence.workers()
    return _describe(context, found, workers, await context.presence.memory(workers))


@router.put(
    "/aliases/{alias}", summary="Let another name lead to a model", dependencies=[Depends(expect_json)]
)
async def set_alias(alias: Alias, body: AliasRequest, context: Shared) -> dict[str, Any]:
    """Set an alias; `name` follows its newest version, `name@version` stays."""
    if alias in context.catalog.names:
        raise InvalidRequest(
            f"alias: {alias!r} is a model of its own: choose another name",
            param="alias",
            code="invalid_value",
        )
    if body.model not in context.catalog.names:
        raise UnknownModel(body.model, sorted(context.catalog.names))
    await ModelBook(context.queue).set_alias(alias, body.model)
    await follow_words(context)
    log.info("alias %s leads to %s", alias, body.model)
    return {"alias": alias, "model": body.model}


@router.delete("/aliases/{alias}", summary="Remove an alias")
async def remove_alias(alias: Alias, context: Shared) -> dict[str, Any]:
    """Remove an alias that was set here; those of the settings stay."""
    if not await ModelBook(context.queue).remove_alias(alias):
        raise UnknownModel(alias)
    await follow_words(context)
    log.info("alias %s removed", alias)
    return {"alias": alias, "deleted": True}


async def follow_words(context: Context) -> None:
    """Bring the catalog of this process up to what operators have said."""
    words = await ModelBook(context.queue).read()
    context.catalog.follow(words.aliases, words.unloaded)


def _describe(
    context: Context, model: Model, workers: list[LiveWorker], memory: dict[str, dict[str, int]]
) -> dict[str, Any]:
    holders = [worker for worker in workers if model.id in worker.models]
    unloaded = model.id in context.catalog.unloaded
    return {
        "id": model.id,
        "object": "model",
        "state": "unloaded" if unloaded else "ready" if holders else "loading",
        "sha256": model.bundle.sha256,
        "aliases": context.catalog.aliases_of(model),
        "workers": [
            {
                "id": worker.id,
                "backend": next(iter(backends_of([worker], model.id)), worker.backend),
                "in_memory": memory.get(worker.id, {}).get(model.id, 0) > 0,
                "bytes": memory.get(worker.id, {}).get(model.id, 0),
            }
            for worker in holders
        ],
    }
