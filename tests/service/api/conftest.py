"""One real server (API, worker, Valkey) on the tiny bundle for the tests that look from outside, and an app
of this process without a worker for those that look from inside."""

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from fastapi import FastAPI
from openai import OpenAI

from flashbulb_service.app import create_app
from flashbulb_service.catalog import Catalog
from flashbulb_service.presence import Presence
from flashbulb_service.queue import Limits, Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.settings import Settings
from support.serving import Serving
from support.tiny_bundle import make_tiny_bundle


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_bundle(folder)
    make_tiny_bundle(folder, version=2)
    make_tiny_bundle(folder, name="tiny-few", step_schedules={2: (1.0, 0.5), 4: (1.0, 0.75, 0.5, 0.25)})
    return folder


@pytest.fixture(scope="session")
def server_url(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Serving(models_dir, tmp_path_factory.mktemp("served") / "data", max_body_bytes="20000") as serving:
        yield serving.url


@pytest.fixture
def openai_client(server_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server_url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server_url, timeout=20) as client:
        yield client


MakeApp = Callable[..., FastAPI]


@pytest_asyncio.fixture
async def make_app(
    redis_url: str, namespace: str, make_queue: Callable[..., Queue], models_dir: Path, tmp_path: Path
) -> AsyncIterator[MakeApp]:
    presence = Presence.connect(redis_url, namespace=namespace)

    def make(
        limits: Limits | None = None, to_worker: socket.socket | None = None, **settings: object
    ) -> FastAPI:
        settings = {"allowed_hosts": ["test"], **settings}
        return create_app(
            Settings(models=models_dir, data=tmp_path, redis=redis_url, namespace=namespace, **settings),
            queue=make_queue(limits),
            results=ResultStore((tmp_path / "results").as_uri(), ttl_s=3600),
            presence=presence,
            catalog=Catalog.load(models_dir, verify=False),
            to_worker=to_worker,
        )

    yield make
    await presence.aclose()
