"""What the routes of one app share, handed over by `create_app`."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request

from flashbulb_service.catalog import Catalog
from flashbulb_service.head_start import ApiEnd
from flashbulb_service.observability import Metrics
from flashbulb_service.presence import Presence
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.safety import WordList
from flashbulb_service.settings import Settings
from flashbulb_service.tenants.store import KeyStore


@dataclass(frozen=True)
class Context:
    """The parts of one API process."""

    settings: Settings
    queue: Queue
    results: ResultStore
    presence: Presence
    catalog: Catalog
    metrics: Metrics
    keys: KeyStore
    words: WordList = field(default_factory=lambda: WordList([]))  # that no prompt may have
    head_starts: ApiEnd | None = None  # of this process's worker, if it has one
    draining: asyncio.Event = field(default_factory=asyncio.Event)  # set: this process stops soon


async def context_of(request: Request) -> Context:  # FastAPI would give a plain function a thread
    """Return the context of the app that serves the request."""
    return cast(Context, request.app.state.context)


Shared = Annotated[Context, Depends(context_of)]
