"""/livez, /readyz, /metrics: for those who run the service."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from flashbulb_service.api.context import Context, Shared
from flashbulb_service.api.errors import NotReady
from flashbulb_service.api.schemas import ERRORS
from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.presence import serves

router = APIRouter(responses=ERRORS)


@router.get("/livez", summary="The process answers")
async def livez() -> dict[str, str]:
    """Answer; restarting this process would not help while this works."""
    return {"status": "alive"}


@router.get("/readyz", summary="A request would be answered")
async def readyz(context: Shared) -> dict[str, Any]:
    """Answer 200 when the queue answers and a live worker serves a model, else 503 with the reason."""
    return await check_ready(context)


@router.get(
    "/metrics",
    summary="Metrics in the Prometheus text format",
    response_class=Response,
    responses={200: {"description": "The metrics", "content": {"text/plain": {}}}},
)
async def metrics(context: Shared) -> Response:
    """Answer with this process's metrics; without the queue, its gauges keep their last values."""
    try:
        context.metrics.queue(await context.queue.stats(), len(await context.presence.workers()))
    except QueueUnavailable:
        context.metrics.workers.set(0)
    return Response(context.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})


async def check_ready(context: Context) -> dict[str, Any]:
    """Tell which models are served by how many workers.

    Raises:
        NotReady: no worker serves any model.
        QueueUnavailable: the queue does not answer.
    """
    await context.queue.ping()
    workers = await context.presence.workers()
    served = [model.id for model in context.catalog.models if serves(workers, model.id)]
    if not served:
        raise NotReady(
            f"expected a live worker for one of {', '.join(m.id for m in context.catalog.models)}, "
            f"found {len(workers)} workers: start one with 'flashbulb worker'"
        )
    return {"status": "ready", "models": served, "workers": len(workers)}
