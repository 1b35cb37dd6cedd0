"""What API and worker both open from settings: catalog, queue, result store, presence list."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flashbulb_service.catalog import Catalog
from flashbulb_service.errors import InvalidRequest
from flashbulb_service.presence import Presence
from flashbulb_service.queue import Limits, Queue
from flashbulb_service.results import ResultStore, make_private
from flashbulb_service.settings import Settings


def load_catalog(settings: Settings, *, verify: bool) -> Catalog:
    """Read the model repository that the settings name; with `verify`, every byte of it.

    Raises:
        BundleRejected: it holds no bundle, or one that cannot be used.
        UnknownModel: the default model or an alias names none of its models.
    """
    return Catalog.load(
        settings.models,
        verify=verify,
        default=settings.default_model,
        aliases=settings.model_aliases,
        openai_aliases=settings.openai_aliases,
    )


@asynccontextmanager
async def open_parts(settings: Settings) -> AsyncIterator[tuple[Queue, ResultStore, Presence]]:
    """Open queue, result store and presence list, and close them at the end.

    Raises:
        InvalidRequest: the settings name no Redis.
    """
    if settings.redis is None:
        raise InvalidRequest(
            "expected the queue's address: pass --redis URL or set FLASHBULB_REDIS", param="--redis"
        )
    limits = Limits(result_ttl_s=settings.results_ttl_s)
    if settings.results_url is None:
        make_private(settings.data.expanduser())
    results = ResultStore(
        settings.results_location, ttl_s=settings.results_ttl_s, max_bytes=settings.results_max_bytes
    )
    presence = Presence.connect(settings.redis, namespace=settings.namespace)
    try:
        async with Queue.connect(settings.redis, namespace=settings.namespace, limits=limits) as queue:
            yield queue, results, presence
    finally:
        await presence.aclose()
        results.close()
