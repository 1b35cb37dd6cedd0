"""Every error, from every route, is the same body with a request id."""

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from flashbulb_service import errors as service_errors
from flashbulb_service.api import errors as api_errors
from flashbulb_service.api.errors import describe
from flashbulb_service.catalog import Catalog
from flashbulb_service.errors import JobFailed, QueueFull, ServiceError
from flashbulb_service.queue import Limits, Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.serve import upkeep
from support.tiny_bundle import make_tiny_bundle

MakeApp = Callable[..., FastAPI]


def check_body(answer: httpx2.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    assert "\n" not in error["message"]
    return error


def test_every_route_answers_errors_alike(http: httpx2.Client) -> None:
    paths = [*http.get("/openapi.json").json()["paths"], "/", "/ui/playground.js", "/openapi.json"]
    assert "/v1/images/generations" in paths and len(paths) >= 9
    for path in paths:
        check_body(http.patch(path), 405, "method_not_allowed")
    for path in ("/nope", "/v1", "/v1/images", "/ui/", "/ui/../settings.py", "/docs"):
        check_body(http.get(path), 404, "route_not_found")
    check_body(http.get("/v1/models/none"), 404, "model_not_found", "model")
    for name in ("none.png", "none", "..%2f..%2fetc%2fpasswd", "%2e%2e.png", "a" * 200 + ".png"):
        answer = http.get(f"/v1/images/results/{name}")
        assert answer.status_code == 404
        check_body(answer, 404, answer.json()["error"]["code"])


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"{", "application/json", "invalid_json"),
        (b"\xff\xfe", "application/json", "invalid_json"),
        (b"[]", "application/json", "invalid_body"),
        (b'"dog"', "application/json", "invalid_body"),
        (b"[" * 9_000, "application/json", "invalid_json"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(
    http: httpx2.Client, content: bytes, kind: str | None, code: str
) -> None:
    headers = {"content-type": kind} if kind else {}
    check_body(http.post("/v1/images/generations", content=content, headers=headers), 400, code)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_another_type_is_refused(http: httpx2.Client, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    for path in ("/v1/images/generations", "/v1/jobs"):
        answer = http.post(path, content=b'{"prompt": "dog"}', headers=headers)
        check_body(answer, 415, "unsupported_media_type")


def test_an_absent_body_is_refused(http: httpx2.Client) -> None:
    check_body(http.post("/v1/images/generations"), 400, "missing_required_parameter")
    check_body(http.post("/v1/images/generations", json={}), 400, "missing_required_parameter", "prompt")


def test_a_body_above_the_limit_is_refused(http: httpx2.Client) -> None:
    large = b'{"prompt": "' + b"a" * 30_000 + b'"}'
    headers = {"content-type": "application/json"}
    check_body(http.post("/v1/images/generations", content=large, headers=headers), 413, "body_too_large")

    def in_pieces() -> Any:  # no Content-Length
        yield from (large[start : start + 5000] for start in range(0, len(large), 5000))

    answer = http.post("/v1/images/generations", content=in_pieces(), headers=headers)
    check_body(answer, 413, "body_too_large")


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


async def test_full_queue_is_429_with_retry_after(make_app: MakeApp) -> None:
    async with client_of(make_app(Limits(max_queued=2))) as client:
        answer = await client.post("/v1/images/generations", json={"prompt": "dog", "n": 3})
        error = check_body(answer, 429, "queue_full")
        assert error["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) >= 1
        assert int(answer.headers["retry-after-ms"]) >= 1


async def test_not_ready_without_a_worker(make_app: MakeApp) -> None:
    async with client_of(make_app()) as client:
        answer = await client.get("/readyz")
        check_body(answer, 503, "not_ready")
        assert (await client.get("/livez")).status_code == 200


async def test_with_scale_to_zero_an_api_is_ready_and_its_waiting_work_can_start_a_worker(
    make_app: MakeApp,
) -> None:
    app = make_app(ready_without_workers=True)
    async with client_of(app) as client:
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["models"], answer.json()["workers"]) == (200, [], 0)
        body = {"task": "text-to-image", "prompt": "dog", "model": "tiny@1"}
        assert (await client.post("/v1/jobs", json=body)).status_code == 200
        metrics = dict(line.rsplit(" ", 1) for line in (await client.get("/metrics")).text.splitlines())
        assert (metrics["flashbulb_ready"], metrics["flashbulb_workers"]) == ("1.0", "0.0")
        assert float(metrics['flashbulb_queue_work_seconds{model="tiny@1"}']) > 0  # what an autoscaler reads
        app.state.context.draining.set()  # a stopping API is not ready all the same
        check_body(await client.get("/readyz"), 503, "not_ready")


async def test_at_rest_with_scale_to_zero_what_the_repository_holds_can_be_asked_for(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    """A new model was 404 until a worker had it, and none was started for it; a replaced one left nothing at all."""
    monkeypatch.setattr("flashbulb_service.serve.CATALOG_INTERVAL_S", 0.01)
    models = tmp_path / "models"
    make_tiny_bundle(models)
    catalog = Catalog.load(models, verify=False)
    app = make_app(ready_without_workers=True)
    context = app.state.context
    settings = context.settings.model_copy(update={"models": models})
    app.state.context = context = dataclasses.replace(context, settings=settings, catalog=catalog)

    async def offered(*expected: str) -> bool:
        return tuple(model.id for model in catalog.models) == expected

    async with upkeep(context), client_of(app) as client:
        make_tiny_bundle(models, name="new")
        await wait_until(partial(offered, "new@1", "tiny@1"))
        make_tiny_bundle(models, version=2)
        shutil.rmtree(models / "tiny" / "1")
        await wait_until(partial(offered, "new@1", "tiny@2"))
        for name in ("new", "tiny"):
            made = await client.post("/v1/jobs", json={"prompt": "dog", "model": name})
            assert made.status_code == 200
    assert set((await context.queue.stats()).queued) == {"new@1", "tiny@2"}


async def test_the_openapi_document_has_the_distributions_version(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashbulb_service.app.version", {"flashbulb": "12.3.4"}.__getitem__)
    async with client_of(make_app()) as client:
        assert (await client.get("/openapi.json")).json()["info"]["version"] == "12.3.4"


async def test_queue_out_of_reach_is_503(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app()
    async with Queue.connect(f"unix://{tmp_path}/nobody.sock") as unreachable:
        context = app.state.context
        app.state.context = type(context)(**{**vars(context), "queue": unreachable})
        async with client_of(app) as client:
            check_body(await client.get("/readyz"), 503, "queue_unavailable")
            answer = await client.post("/v1/images/generations", json={"prompt": "dog"})
            check_body(answer, 503, "queue_unavailable")
            assert (await client.get("/metrics")).status_code == 200


async def test_unforeseen_error_is_a_500_that_tells_no_secrets(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app()

    class Broken(ResultStore):
        async def get(self, name: str) -> bytes | None:
            raise RuntimeError("secret path /etc/shadow")

    context = app.state.context
    broken = Broken((tmp_path / "broken").as_uri(), ttl_s=1)
    app.state.context = type(context)(**{**vars(context), "results": broken})
    async with client_of(app) as client:
        error = check_body(await client.get("/v1/images/results/a.png"), 500, "internal_error")
        assert "secret" not in error["message"]
        assert error["type"] == "server_error"


async def test_pictures_that_do_not_come_in_time_are_504(make_app: MakeApp) -> None:
    app = make_app(request_timeout_s=0.05)
    async with client_of(app) as client:
        answer = await client.post("/v1/images/generations", json={"prompt": "dog", "n": 2})
        check_body(answer, 504, "deadline_exceeded")
    stats = await app.state.context.queue.stats()
    assert (stats.queued, stats.running) == ({}, 0)  # cancelled with the request


def test_every_error_of_the_service_has_a_status_of_its_kind() -> None:
    made: list[Exception] = [
        QueueFull("full", retry_after_s=0.25),
        JobFailed("id", "deadline_exceeded", "late"),
        JobFailed("id", "backend_error", "broken"),
        service_errors.UnknownModel("x"),
        service_errors.JobNotFound("x"),
        service_errors.JobCancelled("x"),
        service_errors.DeadlineUnreachable("late", retry_after_s=0.25),
        service_errors.ConcurrencyExceeded("x", retry_after_s=1),
        service_errors.RateLimited("x", retry_after_s=1),
        service_errors.BudgetExceeded("x", retry_after_s=9000),
        service_errors.ModelUnavailable("x", "unloaded"),
    ]
    taken = {type(error) for error in made}
    for module in (service_errors, api_errors):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, ServiceError) and kind not in taken:
                made.append(kind("message"))
    page = (Path(__file__).resolve().parents[3] / "docs" / "http-api.md").read_text(encoding="utf-8")
    (unavailable,) = (line for line in page.splitlines() if line.startswith("| 503 |"))
    for error in made:
        answer = describe(error)
        assert 400 <= answer.status <= 599
        assert answer.code != "internal_error"
        assert answer.status != 503 or f"`{answer.code}`" in unavailable, "the page of the API leaves it out"
    assert describe(made[0]).headers == {"retry-after": "1", "retry-after-ms": "250"}
    assert [describe(error).status for error in made[:6]] == [429, 504, 500, 404, 404, 409]
    assert describe(HTTPException(418, "teapot")).status == 418
