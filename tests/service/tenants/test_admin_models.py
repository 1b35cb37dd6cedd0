"""The admin API for models: load, unload, other names; for every process of the namespace, and across restarts."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from fastapi import FastAPI

from flashbulb_service.api.admin_models import follow_words
from flashbulb_service.presence import LiveWorker
from flashbulb_service.tenants.store import KeyStore
from support.tiny_bundle import make_tiny_bundle

ClientOf = Callable[..., httpx2.AsyncClient]


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-versions")
    make_tiny_bundle(folder)
    make_tiny_bundle(folder, version=2)
    return folder


@pytest_asyncio.fixture
async def admin(app: FastAPI, client_of: ClientOf, keys: KeyStore) -> AsyncIterator[httpx2.AsyncClient]:
    made = await keys.create("admin", ["admin", "generate"])
    async with client_of(app, made.secret) as client:
        yield client


async def test_an_unloaded_version_gives_its_name_back_to_the_one_before(admin: httpx2.AsyncClient) -> None:
    async def drawn(model: str | None) -> str:
        answer = await admin.post("/v1/jobs", json={"prompt": "dog", "model": model})
        return str(answer.json().get("model") or answer.json()["error"]["code"])

    assert [await drawn(name) for name in ("tiny", "tiny@2", "tiny@1", None)] == [
        "tiny@2",
        "tiny@2",
        "tiny@1",
        "tiny@2",
    ]
    answer = await admin.post("/v1/admin/models/tiny@2/unload")
    assert (answer.status_code, answer.json()["state"]) == (200, "unloaded")
    assert [await drawn(name) for name in ("tiny", "tiny@2", None)] == ["tiny@1", "model_unloaded", "tiny@1"]
    assert [one["version"] for one in (await admin.get("/v1/models")).json()["data"]] == [1]
    await admin.post("/v1/admin/models/tiny@1/unload")
    for name in ("tiny", "tiny@1", None):
        refused = await admin.post("/v1/jobs", json={"prompt": "dog", "model": name})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unloaded")
        assert "flashbulb models load tiny@" in refused.json()["error"]["message"]
    loaded = await admin.post("/v1/admin/models/tiny/load")  # the newest of that name
    assert (loaded.json()["id"], loaded.json()["state"]) == ("tiny@2", "loading")
    assert await drawn("tiny") == "tiny@2"
    assert (await admin.post("/v1/admin/models/none/load")).status_code == 404


async def test_it_shows_which_worker_has_what_in_memory(app: FastAPI, admin: httpx2.AsyncClient) -> None:
    presence = app.state.context.presence
    worker = LiveWorker("w1", ("tiny@1", "tiny@2"), "auto", backends=("onnx", "onnx"))
    await presence.announce(worker, memory={"tiny@1": 0, "tiny@2": 4096})
    data = (await admin.get("/v1/admin/models")).json()["data"]
    assert [(one["id"], one["state"]) for one in data] == [("tiny@1", "ready"), ("tiny@2", "ready")]
    assert [one["workers"][0]["in_memory"] for one in data] == [False, True]
    assert data[1]["workers"] == [{"id": "w1", "backend": "onnx", "in_memory": True, "bytes": 4096}]


async def test_words_reach_other_processes_and_outlive_them(
    make_app: Callable[..., FastAPI], admin: httpx2.AsyncClient
) -> None:
    await admin.post("/v1/admin/models/tiny@2/unload")
    assert (await admin.put("/v1/admin/aliases/sketch", json={"model": "tiny@1"})).status_code == 200
    other = make_app().state.context
    await follow_words(other)
    assert [other.catalog.find(name).id for name in ("tiny", "sketch")] == ["tiny@1", "tiny@1"]
    assert (await admin.get("/v1/admin/models")).json()["aliases"] == {"sketch": "tiny@1"}
    assert (await admin.delete("/v1/admin/aliases/sketch")).json() == {"alias": "sketch", "deleted": True}
    assert (await admin.get("/v1/models/sketch")).status_code == 404
    assert (await admin.delete("/v1/admin/aliases/sketch")).status_code == 404


@pytest.mark.parametrize(
    ("alias", "model", "status"),
    [("tiny", "tiny@1", 400), ("sketch", "none", 404), ("a b", "tiny", 400), ("x" * 65, "tiny", 400)],
)
async def test_an_alias_that_cannot_be_is_refused(
    admin: httpx2.AsyncClient, alias: str, model: str, status: int
) -> None:
    answer = await admin.put(f"/v1/admin/aliases/{alias}", json={"model": model})
    assert answer.status_code == status
    assert (await admin.get("/v1/admin/models")).json()["aliases"] == {}


async def test_models_are_an_admin_s_word(app: FastAPI, client_of: ClientOf, keys: KeyStore) -> None:
    made = await keys.create("shop", ["generate"])
    async with client_of(app, made.secret) as client:
        for method, path in (("GET", "models"), ("POST", "models/tiny/unload"), ("PUT", "aliases/a")):
            answer = await client.request(method, f"/v1/admin/{path}", json={"model": "tiny"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")
