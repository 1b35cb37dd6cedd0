"""The admin API: keys from birth to end, the queue's gates and dead letters."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from fastapi import FastAPI

from flashbulb_service.jobs import JobError, NewJob
from flashbulb_service.queue import Queue
from flashbulb_service.tenants.keys import KeyLimits
from flashbulb_service.tenants.store import KeyStore

ClientOf = Callable[..., httpx2.AsyncClient]


@pytest_asyncio.fixture
async def admin(app: FastAPI, client_of: ClientOf, keys: KeyStore) -> AsyncIterator[httpx2.AsyncClient]:
    made = await keys.create("admin", ["admin"])
    async with client_of(app, made.secret) as client:
        yield client


async def test_key_from_birth_to_end(admin: httpx2.AsyncClient, app: FastAPI, client_of: ClientOf) -> None:
    answer = await admin.post(
        "/v1/admin/keys", json={"name": "shop", "limits": {"requests_per_minute": 100, "weight": 2}}
    )
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    assert made["scopes"] == ["generate"]
    assert made["limits"] == KeyLimits(requests_per_minute=100, weight=2).model_dump()
    path = f"/v1/admin/keys/{made['id']}"
    shown = (await admin.get(path)).json()
    listed = (await admin.get("/v1/admin/keys")).json()["data"]
    assert shown in listed and len(listed) == 2
    assert not {"secret", "digest", "old_digest"} & set(shown)

    async with client_of(app, made["secret"]) as client:
        assert (await client.post("/v1/jobs", json={"prompt": "dog"})).status_code == 200
        rotated = (await admin.post(f"{path}/rotate", json={"grace_s": 0})).json()
        assert (await client.post("/v1/jobs", json={"prompt": "dog"})).status_code == 401
    async with client_of(app, rotated["secret"]) as client:
        limits = (await admin.put(f"{path}/limits", json={"max_live": 1})).json()["limits"]
        assert limits == KeyLimits(max_live=1).model_dump()
        assert (await client.post("/v1/jobs", json={"prompt": "dog"})).status_code == 429
        assert (await admin.delete(path)).json() == {"id": made["id"], "object": "api_key", "deleted": True}
        assert (await client.get("/v1/models")).status_code == 401
    assert (await admin.get(path)).json()["revoked_at"] is not None
    for answer in (await admin.delete(path), await admin.post(f"{path}/rotate", json={})):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "key_not_found")
    usage = (await admin.get(f"{path}/usage", params={"days": 2})).json()["data"]
    assert [day["requests"] for day in usage] == [0, 2]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\u202eb"}, "name"),
        ({"name": "a", "scopes": ["root"]}, "scopes.0"),
        ({"name": "a", "scopes": []}, "scopes"),
        ({"name": "a", "limits": {"requests_per_minute": 0}}, "limits.requests_per_minute"),
        ({"name": "a", "limits": {"budget_ms": 1.5}}, "limits.budget_ms"),
        ({"name": "a", "limits": {"weight": 0}}, "limits.weight"),
        ({"name": "a", "secret": "mine"}, "secret"),
    ],
)
async def test_a_key_that_cannot_be_is_refused_with_its_field(
    admin: httpx2.AsyncClient, body: dict[str, Any], param: str
) -> None:
    answer = await admin.post("/v1/admin/keys", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert len((await admin.get("/v1/admin/keys")).json()["data"]) == 1


@pytest.mark.parametrize("key_id", ["key_0123456789abcdef", "key_x", "..", "*", "key_0123456789abcdef:x"])
async def test_an_unknown_key_is_404(admin: httpx2.AsyncClient, key_id: str) -> None:
    for call in (
        admin.get(f"/v1/admin/keys/{key_id}/usage"),
        admin.put(f"/v1/admin/keys/{key_id}/limits", json={}),
        admin.post(f"/v1/admin/keys/{key_id}/rotate", json={}),
    ):
        assert (await call).status_code == 404


async def test_pause_holds_the_queue_and_drain_the_door(
    admin: httpx2.AsyncClient, app: FastAPI, client_of: ClientOf, keys: KeyStore, queue: Queue
) -> None:
    drawing = await keys.create("a")
    async with client_of(app, drawing.secret) as client:
        paused = await admin.post("/v1/admin/queue/models/tiny/pause")
        assert paused.json() == {"model": "tiny@1", "gate": "paused"}
        assert (await client.post("/v1/jobs", json={"prompt": "dog"})).status_code == 200
        assert await queue.claim("w", ["tiny@1"], 8, 60) == []
        shown = (await admin.get("/v1/admin/queue")).json()
        assert (shown["queued"], shown["gates"]) == ({"tiny@1": 1}, {"tiny@1": "paused"})
        await admin.post("/v1/admin/queue/models/tiny@1/drain")
        refused = await client.post("/v1/jobs", json={"prompt": "dog"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_draining")
        assert len(await queue.claim("w", ["tiny@1"], 8, 60)) == 1
        await admin.post("/v1/admin/queue/models/tiny/resume")
        assert (await client.post("/v1/jobs", json={"prompt": "dog"})).status_code == 200
    assert (await admin.get("/v1/admin/queue")).json()["gates"] == {}
    assert (await admin.post("/v1/admin/queue/models/none/pause")).status_code == 404
    assert (await admin.post("/v1/admin/queue/models/tiny/explode")).status_code == 400


async def test_dead_letters_are_listed_without_their_prompt_and_replayed(
    admin: httpx2.AsyncClient, queue: Queue
) -> None:
    [job_id] = (await queue.enqueue([NewJob("tiny@1", "b", b"a secret prompt")])).ids
    [job] = await queue.claim("w", ["tiny@1"], 1, 60)
    await queue.fail("w", job, JobError("backend_error", "broken"), retry=False)
    answer = await admin.get("/v1/admin/queue/dead")
    [letter] = answer.json()["data"]
    assert (letter["id"], letter["error"]["code"], letter["attempts"]) == (job_id, "backend_error", 1)
    assert "secret prompt" not in answer.text
    replay = f"/v1/admin/queue/dead/{job_id}/replay"
    assert (await admin.post(replay)).json() == {"id": job_id, "replayed": True}
    assert (await admin.post(replay)).status_code == 404
    assert [job.id for job in await queue.claim("w", ["tiny@1"], 1, 60)] == [job_id]
