"""The API process: routes over a queue and a result store. Never imports a model library."""

import socket
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from flashbulb_service.api import admin, admin_models, edits, health, images, jobs, models, playground, videos
from flashbulb_service.api.context import Context
from flashbulb_service.api.errors import answer_error
from flashbulb_service.api.gate import Gate
from flashbulb_service.api.middleware import RequestFrame
from flashbulb_service.api.short_way import ShortWay
from flashbulb_service.catalog import Catalog
from flashbulb_service.errors import ServiceError
from flashbulb_service.head_start import ApiEnd
from flashbulb_service.observability import Metrics
from flashbulb_service.presence import Presence
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.safety import word_list_of
from flashbulb_service.settings import Settings
from flashbulb_service.tenants.access import Access
from flashbulb_service.tenants.store import KeyStore
from flashbulb_service.tracing import OFF, Tracing

ERROR_SCHEMA = {"$ref": "#/components/schemas/ErrorBody"}


def create_app(
    settings: Settings,
    *,
    queue: Queue,
    results: ResultStore,
    presence: Presence,
    catalog: Catalog,
    tracing: Tracing = OFF,
    to_worker: socket.socket | None = None,
) -> FastAPI:
    """Make an API over open parts; whoever opened them closes them.

    to_worker: the API's end of `head_start.open_pair`; whoever opened it calls `context.head_starts.hear`.
    """
    keys = KeyStore(queue)
    metrics = Metrics()
    head_starts = None if to_worker is None else ApiEnd(to_worker, queue, metrics.early_answers.inc)
    context = Context(
        settings, queue, results, presence, catalog, metrics, keys, word_list_of(settings), head_starts
    )
    public_host = urlsplit(settings.public_url).hostname if settings.public_url else None
    app = FastAPI(
        title="Flashbulb",
        version=version("flashbulb"),
        summary="Pictures and videos from distilled few-step students, in OpenAI's shape",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        telemetry=_telemetry(tracing),
    )
    app.state.context = context
    app.add_middleware(
        RequestFrame,
        short_way=None
        if tracing.provider
        else ShortWay(head_starts),  # FastAPI makes the spans of its routes
        admit=Gate(
            keys,
            Access.of(settings.auth, settings.host),
            settings.allowed_hosts | ({public_host} if public_host else set()),
        ),
        metrics=context.metrics,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        body_timeout_s=settings.body_timeout_s,
        bound_to=settings.host,
        allowed_hosts=settings.allowed_hosts,
    )
    for router in (
        images.router,
        edits.router,
        jobs.router,
        videos.router,
        models.router,
        health.router,
        admin.router,
        admin_models.router,
        playground.create_router(),
    ):
        app.include_router(router)
    for kind in (ServiceError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)
    _declare_own_errors(app)
    return app


def _telemetry(tracing: Tracing) -> TelemetryConfig:
    """Have FastAPI make a span for each request under /v1, without its own metrics, logs and inner steps."""
    return TelemetryConfig(
        tracing=tracing.provider is not None,
        tracer_provider=tracing.provider,
        metrics=False,
        logs=False,  # they quote what did not validate: prompts
        operation_spans=False,
        auto_configure=False,
        exclude=lambda scope: not scope["path"].startswith("/v1/"),
    )


def _declare_own_errors(app: FastAPI) -> None:
    """Say in the OpenAPI document what errors look like: JSON on every route, and 400 where FastAPI says 422."""
    document = app.openapi

    def openapi() -> dict[str, Any]:
        made = document()
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                for status, answer in operation["responses"].items():
                    if status >= "400":
                        answer["content"] = {"application/json": {"schema": ERROR_SCHEMA}}
        for name in ("HTTPValidationError", "ValidationError"):
            made.get("components", {}).get("schemas", {}).pop(name, None)
        return made

    app.openapi = openapi  # type: ignore[method-assign]
