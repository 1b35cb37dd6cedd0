"""Plain requests pass the framework by; nobody can tell from the answers. One more parameter of the content type makes
a request take the long way, so both ways are asked the same here."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from flashbulb_service.api.short_way import ShortWay
from flashbulb_service.queue import Limits

MakeApp = Callable[..., FastAPI]
ROUTE = "/v1/images/generations"
SHORT, LONG = "application/json", "application/json; charset=utf-8"
CHANGING = ("x-request-id", "idempotent-replayed")

SERVED: list[dict[str, Any]] = [
    {"prompt": "dog"},
    {"prompt": "dog 🐕 שלום", "n": 3, "seed": 2**63 - 1, "user": "somebody"},
    {"prompt": "dog", "model": "tiny@1", "size": "64x64", "quality": "hd", "response_format": "url"},
    {"prompt": "dog", "output_format": "webp", "output_compression": 20, "metadata": {"order": "7"}},
    {"prompt": "dog", "rng_seed": 5, "num_inference_steps": 1, "style": "vivid", "moderation": "low"},
    {"prompt": "dog", "size": "65x66", "size_policy": "nearest", "priority": 3, "deadline_ms": 60_000},
    {"prompt": "dog", "model": "tiny-few", "steps": 2, "partial_images": 2, "negative_prompt": ""},
]
REFUSED: list[tuple[bytes, dict[str, str]]] = [
    *(
        (json.dumps(body).encode(), {})
        for body in (
            {},
            [],
            "dog",
            None,
            {"prompt": ""},
            {"prompt": "   "},
            {"prompt": "a\0b"},
            {"prompt": "\ud800"},
            {"prompt": "x" * 5000},
            {"prompt": 7},
            {"prompt": "dog", "n": 0},
            {"prompt": "dog", "n": "2"},
            {"prompt": "dog", "seed": -1},
            {"prompt": "dog", "seed": 2**63},
            {"prompt": "dog", "seed": 1.5},
            {"prompt": "dog", "sed": 1},
            {"prompt": "dog", "width": 64},
            {"prompt": "dog", "size": "7x7"},
            {"prompt": "dog", "model": "no-such-model"},
            {"prompt": "dog", "steps": 3},
            {"prompt": "dog", "rng_seed": 1, "seed": 2},
            {"prompt": "dog", "background": "transparent"},
            {"prompt": "dog", "guidance_scale": 99},
            {"prompt": "dog", "webhook_url": "http://127.0.0.1/"},
            {"prompt": "dog", "metadata": {"k": "v" * 600}},
            {"prompt": "dog", "idempotency_key": "a"},
        )
    ),
    (b"", {}),
    (b"{", {}),
    (b'{"prompt": NaN}', {}),
    (b'{"prompt": "dog", "prompt": ""}', {}),
    (b"\xff\xfe", {}),
    (b"[" * 30_000, {}),
    (b'{"prompt": "dog"}', {"idempotency-key": ""}),
    (b'{"prompt": "dog"}', {"idempotency-key": "k" * 201}),
    (b'{"prompt": "dog", "idempotency_key": "a"}', {"idempotency-key": "b"}),
]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each request took the short way, in their order."""
    taken: list[bool] = []
    serve = ShortWay.serve

    async def watched(*args: Any) -> bool:
        taken.append(await serve(*args))
        return taken[-1]

    monkeypatch.setattr(ShortWay, "serve", watched)
    return taken


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
    )


def lasting(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in CHANGING}


async def finish_all(app: FastAPI, stop: asyncio.Event) -> None:
    """End every job as a worker would."""
    queue = app.state.context.queue
    models = [model.id for model in app.state.context.catalog.models]
    outcome = json.dumps(
        {"file": "p.png", "batch_size": 1, "batch_ms": 2.5, "encode_ms": 1.0, "bundle_sha256": "0" * 64}
    ).encode()
    while not stop.is_set():
        await queue.wait_for_work(models, 0.05)
        for job in await queue.claim("w", models, 8, 5.0):
            await queue.complete("w", job, outcome, attached=b"picture")


@pytest.mark.parametrize("body", SERVED, ids=json.dumps)
@pytest.mark.parametrize("first", [SHORT, LONG], ids=["short-first", "long-first"])
async def test_both_ways_give_the_same_answer(
    make_app: MakeApp, ways: list[bool], body: dict[str, Any], first: str
) -> None:
    app = make_app()
    await app.state.context.results.put("p.png", b"picture")
    order = [first, LONG if first == SHORT else SHORT]
    stop = asyncio.Event()
    async with client_of(app) as client:
        working = asyncio.create_task(finish_all(app, stop))
        answers = [
            await client.post(
                ROUTE, content=json.dumps(body), headers={"content-type": kind, "idempotency-key": "k"}
            )
            for kind in order
        ]
        stop.set()
        await working
    assert ways == [kind == SHORT for kind in order]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert lasting(answers[0]) == lasting(answers[1])
    assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None, "true"]


@pytest.mark.parametrize(("body", "headers"), REFUSED)
async def test_both_ways_refuse_in_the_same_words(
    make_app: MakeApp, body: bytes, headers: dict[str, str]
) -> None:
    app = make_app(Limits(max_queued=0))  # what is not refused for its words is refused here
    async with client_of(app) as client:
        short, long = [
            await client.post(ROUTE, content=body, headers={**headers, "content-type": kind})
            for kind in (SHORT, LONG)
        ]
    assert short.status_code == long.status_code >= 400
    assert short.content == long.content
    assert lasting(short) == lasting(long)


async def test_what_is_out_of_the_ordinary_takes_the_long_way(make_app: MakeApp, ways: list[bool]) -> None:
    app = make_app(Limits(max_queued=0))
    async with client_of(app) as client:
        for body, headers in (
            ({"prompt": "dog", "stream": True}, [("content-type", SHORT)]),
            ({"prompt": "dog"}, [("content-type", SHORT), ("content-type", SHORT)]),
            (
                {"prompt": "dog"},
                [("content-type", SHORT), ("idempotency-key", "a"), ("idempotency-key", "b")],
            ),
            ({"prompt": "dog"}, [("content-type", "text/plain")]),
            ({"prompt": "dog", "n": 0}, [("content-type", SHORT)]),
        ):
            await client.post(ROUTE, content=json.dumps(body), headers=headers)
        await client.get(ROUTE)
        await client.post("/v1/jobs", json={"prompt": "dog"})
        await client.post(ROUTE, json={"prompt": "dog"}, headers={"x-stainless-retry-count": "1"})
    assert ways == [False] * 7 + [True]


async def test_both_ways_count_alike(make_app: MakeApp) -> None:
    app = make_app(Limits(max_queued=0))
    metrics = app.state.context.metrics
    async with client_of(app) as client:
        for kind in (SHORT, LONG):
            await client.post(ROUTE, content=b'{"prompt": "dog"}', headers={"content-type": kind})
    told = metrics.exposition().decode()
    assert f'requests_total{{method="POST",route="{ROUTE}",status="429"}} 2.0' in told
    assert 'shed_total{reason="queue_full"} 2.0' in told


async def test_an_unforeseen_error_is_a_500_in_our_form_on_both_ways(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app()

    async def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app.state.context.queue, "enqueue", broken)
    async with client_of(app) as client:
        short, long = [
            await client.post(ROUTE, content=b'{"prompt": "dog"}', headers={"content-type": kind})
            for kind in (SHORT, LONG)
        ]
    assert short.status_code == long.status_code == 500
    assert short.json() == long.json()
    assert short.json()["error"]["code"] == "internal_error"
