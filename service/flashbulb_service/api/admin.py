"""/v1/admin: keys and the queue, for those who run the service. The gate lets in only who may come here."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from flashbulb_service.api.context import Shared
from flashbulb_service.api.media import expect_json
from flashbulb_service.api.schemas import ERRORS
from flashbulb_service.errors import JobNotFound
from flashbulb_service.jobs import JobView
from flashbulb_service.queue import Gate
from flashbulb_service.tenants.access import Scope
from flashbulb_service.tenants.keys import MAX_GRACE_S, MAX_NAME_CHARS, KeyLimits, KeyRecord, NewKey
from flashbulb_service.tenants.store import MAX_USAGE_DAYS

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/admin", responses=ERRORS, tags=["admin"])

Action = Literal["pause", "drain", "resume"]
GATES: Mapping[Action, Gate | None] = {"pause": "paused", "drain": "draining", "resume": None}
JSON = [Depends(expect_json)]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeyRequest(_Body):
    """A key to make."""

    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    scopes: list[Scope] = Field(default=["generate"], min_length=1, max_length=2)
    limits: KeyLimits = KeyLimits()


class RotateRequest(_Body):
    """How long the secret before stays good."""

    grace_s: float = Field(default=86_400.0, ge=0, le=MAX_GRACE_S)


# ---------------------------------------------------------------------------------------------------- keys


@router.post("/keys", summary="Make an API key", dependencies=JSON)
async def create_key(body: KeyRequest, context: Shared) -> JSONResponse:
    """Make a key. The answer is the only place where its secret is ever shown."""
    made = await context.keys.create(body.name, body.scopes, body.limits)
    log.info("API key %s made with the scopes %s", made.record.id, " ".join(made.record.scopes))
    return _with_secret(made)


@router.get("/keys", summary="All API keys")
async def list_keys(context: Shared) -> dict[str, Any]:
    """List keys, the oldest first, with those that were revoked in the last months."""
    return {"object": "list", "data": [describe_key(record) for record in await context.keys.all()]}


@router.get("/keys/{key_id}", summary="One API key")
async def get_key(key_id: str, context: Shared) -> dict[str, Any]:
    """Describe a key."""
    return describe_key(await context.keys.get(key_id))


@router.put("/keys/{key_id}/limits", summary="Replace the limits of an API key", dependencies=JSON)
async def set_limits(key_id: str, body: KeyLimits, context: Shared) -> dict[str, Any]:
    """Replace all limits; what is left out is not limited any more."""
    record = await context.keys.set_limits(key_id, body)
    log.info("limits of API key %s set: %s", key_id, body.model_dump_json(exclude_none=True))
    return describe_key(record)


@router.post("/keys/{key_id}/rotate", summary="Give an API key a new secret", dependencies=JSON)
async def rotate_key(key_id: str, body: RotateRequest, context: Shared) -> JSONResponse:
    """Make a new secret; the one before stays good for the grace period."""
    made = await context.keys.rotate(key_id, grace_s=body.grace_s)
    log.info("API key %s has a new secret; the old one is good for %.0f s more", key_id, body.grace_s)
    return _with_secret(made)


@router.delete("/keys/{key_id}", summary="Revoke an API key")
async def revoke_key(key_id: str, context: Shared) -> dict[str, Any]:
    """End a key; what it used can be read for some months."""
    await context.keys.revoke(key_id)
    log.info("API key %s revoked", key_id)
    return {"id": key_id, "object": "api_key", "deleted": True}


@router.get("/keys/{key_id}/usage", summary="What an API key used, by day")
async def get_usage(
    key_id: str, context: Shared, days: Annotated[int, Query(ge=1, le=MAX_USAGE_DAYS)] = 30
) -> dict[str, Any]:
    """Report requests, pictures and device time of the last days (UTC), today last."""
    return {"object": "list", "data": [asdict(day) for day in await context.keys.usage(key_id, days=days)]}


def describe_key(record: KeyRecord) -> dict[str, Any]:
    """Describe a key without anything that would help to use it."""
    return {
        "id": record.id,
        "object": "api_key",
        "name": record.name,
        "scopes": list(record.scopes),
        "limits": record.limits.model_dump(),
        "created_at": int(record.created_at),
        "rotated_at": _seconds(record.rotated_at),
        "old_secret_until": _seconds(record.old_until),
        "revoked_at": _seconds(record.revoked_at),
    }


def _with_secret(made: NewKey) -> JSONResponse:
    content = {**describe_key(made.record), "secret": made.secret}
    return JSONResponse(content, headers={"cache-control": "no-store"})


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)


# --------------------------------------------------------------------------------------------------- queue


@router.get("/queue", summary="What is in the queue")
async def get_queue(context: Shared) -> dict[str, Any]:
    """Count jobs, and name the models that are paused or drained."""
    stats = await context.queue.stats()
    counts = {
        "queued": dict(stats.queued),
        "running": stats.running,
        "delayed": stats.delayed,
        "dead": stats.dead,
        "oldest_age_s": stats.oldest_age_s,
    }
    return {**counts, "gates": await context.queue.gates()}


@router.get("/queue/dead", summary="Jobs that failed for good")
async def list_dead(
    context: Shared,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    offset: Annotated[int, Query(ge=0, le=100_000)] = 0,
) -> dict[str, Any]:
    """List dead letters, the newest first."""
    views = await context.queue.dead_letters(limit=limit, offset=offset)
    return {"object": "list", "data": [describe_dead(view) for view in views]}


@router.post("/queue/dead/{job_id}/replay", summary="Queue a failed job again")
async def replay_dead(job_id: str, context: Shared) -> dict[str, Any]:
    """Queue a dead letter with fresh attempts and no deadline."""
    if not await context.queue.replay_dead(job_id):
        raise JobNotFound(job_id[:80])
    log.info("dead letter %s queued again", job_id)
    return {"id": job_id, "replayed": True}


@router.post("/queue/models/{model}/{action}", summary="Pause, drain or resume a model")
async def set_gate(model: str, action: Action, context: Shared) -> dict[str, Any]:
    """Pause: jobs are taken and wait. Drain: no new ones are taken. Batches in hand go on in both."""
    model_id = context.catalog.find(model, unloaded_too=True).id
    await context.queue.set_gate(model_id, GATES[action])
    log.info("model %s: %s", model_id, action)
    return {"model": model_id, "gate": GATES[action]}


def describe_dead(view: JobView) -> dict[str, Any]:
    """Describe a dead letter; its prompt stays with the worker."""
    error = view.error
    return {
        "id": view.id,
        "model": view.model,
        "attempts": view.attempt,
        "enqueued_at": int(view.enqueued_at),
        "failed_at": _seconds(view.finished_at),
        "error": {"code": error.code, "message": error.message} if error else None,
    }
