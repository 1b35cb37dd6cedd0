"""/livez, /readyz, /metrics: for those who run the service."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from flashbulb_service.api.context import Context, Shared
from flashbulb_service.api.errors import NotReady
from flashbulb_service.api.schemas import ERRORS
from flashbulb_service.capacity import work_seconds
from flashbulb_service.catalog import exporter_times
from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.measures import merge_expositions, write_families
from flashbulb_service.presence import LiveWorker, backends_of, serves
from flashbulb_service.queue import QueueStats
from flashbulb_service.wire import WIRE

router = APIRouter(responses=ERRORS)


@router.get("/livez", summary="The process answers")
async def livez() -> dict[str, str]:
    """Answer; restarting this process would not help while this works."""
    return {"status": "alive"}


@router.get("/readyz", summary="A request would be answered")
async def readyz(context: Shared) -> dict[str, Any]:
    """Answer 200 when the queue answers and a live worker serves a model, else 503 with the reason.

    With `ready_without_workers` the queue is enough: what is asked for waits in it until a worker comes.
    """
    return await check_ready(context, need_worker=not context.settings.ready_without_workers)


@router.get(
    "/metrics",
    summary="Metrics in the Prometheus text format",
    response_class=Response,
    responses={200: {"description": "The metrics", "content": {"text/plain": {}}}},
)
async def metrics(context: Shared) -> Response:
    """Answer with this process's metrics and those of the live workers; without the queue, with the former."""
    counted: dict[str, bytes] = {}
    try:
        workers = await context.presence.workers()
        stats = await context.queue.stats()
        context.metrics.queue(
            stats, waiting_work(context, stats), len(workers), ready=is_ready(context, workers)
        )
        counted = await context.presence.metrics(workers)
    except QueueUnavailable:
        context.metrics.queue_lost()
    body = context.metrics.exposition()
    if counted:
        body += write_families(await asyncio.to_thread(merge_expositions, counted, label="worker"))
    return Response(body, headers={"content-type": CONTENT_TYPE_LATEST})


def waiting_work(context: Context, stats: QueueStats) -> dict[str, float]:
    """Return model -> seconds that one worker would take for what waits, by the times of its exporter."""
    known = {model.id: model.bundle.manifest for model in context.catalog.models}
    backend = context.settings.backend
    times = {name: exporter_times(known[name], backend) for name in stats.queued if name in known}
    return work_seconds(stats.queued, times)


def served_models(context: Context, workers: Sequence[LiveWorker]) -> list[str]:
    """Return the models of the catalog that a live worker serves."""
    return [model.id for model in context.catalog.models if serves(workers, model.id)]


def is_ready(context: Context, workers: Sequence[LiveWorker]) -> bool:
    """Tell whether /readyz would answer 200, given an answering queue."""
    enough = context.settings.ready_without_workers or bool(served_models(context, workers))
    return enough and not context.draining.is_set()


async def check_ready(context: Context, *, need_worker: bool = True) -> dict[str, Any]:
    """Tell which models are served by how many workers.

    Raises:
        NotReady: this process stops, or one worker is needed and none serves any model.
        QueueUnavailable: the queue does not answer.
    """
    if context.draining.is_set():
        raise NotReady("this server is stopping and finishes what it has: ask another one")
    await context.queue.ping()
    workers = await context.presence.workers()
    served = served_models(context, workers)
    if need_worker and not served:
        raise NotReady(
            f"expected a live worker for one of {', '.join(m.id for m in context.catalog.models)}, "
            f"found {len(workers)} workers: start one with 'flashbulb worker'"
        )
    backends = {model: backends_of(workers, model) for model in served}
    wire = Counter(f"{worker.wire}" for worker in workers)
    return {
        "status": "ready",
        "models": served,
        "workers": len(workers),
        "backends": backends,
        "wire": {"api": WIRE, "workers": dict(sorted(wire.items()))},
    }
