"""An app that asks for keys, its store, and a client per key."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from fastapi import FastAPI

from flashbulb_service.app import create_app
from flashbulb_service.catalog import Catalog
from flashbulb_service.presence import Presence
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.settings import Settings
from flashbulb_service.tenants.store import KeyStore
from support.tiny_bundle import make_tiny_bundle

MakeQueue = Callable[..., Queue]


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_bundle(folder)
    return folder


@pytest_asyncio.fixture
async def keys(queue: Queue) -> KeyStore:
    return KeyStore(queue)


@pytest_asyncio.fixture
async def make_app(
    redis_url: str, namespace: str, queue: Queue, models_dir: Path, tmp_path: Path
) -> AsyncIterator[Callable[..., FastAPI]]:
    presence = Presence.connect(redis_url, namespace=namespace)

    def make(**settings: object) -> FastAPI:
        return create_app(
            Settings(models=models_dir, data=tmp_path, redis=redis_url, namespace=namespace, **settings),
            queue=queue,
            results=ResultStore((tmp_path / "results").as_uri(), ttl_s=3600),
            presence=presence,
            catalog=Catalog.load(models_dir, verify=False),
        )

    yield make
    await presence.aclose()


@pytest.fixture
def app(make_app: Callable[..., FastAPI]) -> FastAPI:
    return make_app(auth="keys", request_timeout_s=0.01)


def client_of(app: FastAPI, secret: str | None = None) -> httpx2.AsyncClient:
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    return httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1:8000", headers=headers
    )


@pytest.fixture(name="client_of")
def client_of_fixture() -> Callable[..., httpx2.AsyncClient]:
    return client_of
