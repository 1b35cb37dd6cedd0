"""Which requests a worker may begin before they are queued, and the answer to one whose picture it tells early."""

import asyncio
import base64
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from flashbulb_service.head_start import WorkerEnd, open_pair
from flashbulb_service.tasks import ImageOutcome

MakeApp = Callable[..., FastAPI]
ROUTE = "/v1/images/generations"
SECRET = "whsec_" + "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    made = open_pair()
    assert made is not None
    yield made
    for end in made:
        end.close()


def told(end: socket.socket) -> list[bytes]:
    """The messages that a worker would find; empty ones only wake it."""
    found = []
    while True:
        try:
            found.append(end.recv(1 << 20))
        except BlockingIOError:
            return found


@pytest.mark.parametrize(
    ("fields", "headers", "is_given"),
    [
        ({}, {}, True),
        ({"output_format": "webp", "seed": 5}, {}, True),
        ({}, {"x-stainless-retry-count": "0"}, True),
        ({}, {"x-stainless-retry-count": "1"}, False),  # it may have been drawn already
        ({}, {"Idempotency-Key": "k"}, False),  # it can be asked for again: only what stands may be told
        ({"idempotency_key": "k"}, {}, False),
        ({"n": 2}, {}, False),
        ({"stream": True}, {}, False),
        ({"model": "tiny-few", "steps": 2, "partial_images": 1}, {}, False),  # previews are stored and told
        ({"webhook_url": "https://example.com/"}, {}, False),  # it must say the same
        ({"response_format": "url"}, {}, False),  # the address would lead nowhere
        ({"prompt": "  "}, {}, False),
        ({"prompt": "forbidden fruit"}, {}, False),
        ({"model": "no-such-model"}, {}, False),
    ],
)
async def test_only_a_plain_request_for_one_picture_gets_a_head_start(
    make_app: MakeApp,
    pair: tuple[socket.socket, socket.socket],
    tmp_path: Any,
    fields: dict[str, Any],
    headers: dict[str, str],
    is_given: bool,
) -> None:
    words = tmp_path / "words"
    words.write_text("forbidden\n")
    app = make_app(to_worker=pair[0], request_timeout_s=0.05, blocked_words=words, webhook_secret=SECRET)
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post(ROUTE, json={"prompt": "dog", **fields}, headers=headers)
    messages = told(pair[1])
    assert messages[0] == b""  # a request begins: the worker wakes while it is read
    assert len(messages) == 1 + is_given


async def test_no_other_request_wakes_the_worker(
    make_app: MakeApp, pair: tuple[socket.socket, socket.socket]
) -> None:
    app = make_app(to_worker=pair[0])
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
        for path in ("/livez", "/v1/models", "/v1/jobs", "/v1/images/results/a.png"):
            await client.get(path)
    assert told(pair[1]) == []


async def test_an_early_picture_is_the_answer_though_its_job_is_not_done(
    make_app: MakeApp,
    pair: tuple[socket.socket, socket.socket],
    wait_until: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = make_app(to_worker=pair[0])
    sent_at = 100.0
    monkeypatch.setattr(
        app.state.context.head_starts, "_clock", lambda: sent_at
    )  # a busy machine makes nothing too old
    context = app.state.context
    worker = WorkerEnd(pair[1], clock=lambda: sent_at)
    loop = asyncio.get_running_loop()
    loop.add_reader(pair[0], context.head_starts.hear)
    jobs: list[Any] = []

    async def given() -> bool:
        jobs.extend(worker.heard())
        return bool(jobs)

    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        asking = asyncio.create_task(client.post(ROUTE, json={"prompt": "dog", "seed": 3}))
        await wait_until(given)
        outcome = ImageOutcome(
            file=f"{jobs[0].id}.png", batch_size=1, batch_ms=8.0, encode_ms=1.0, bundle_sha256="0" * 64
        )
        assert worker.answer(jobs[0], outcome.to_bytes(), b"a picture", started_at=0.0, finished_at=0.009)
        answer = await asking
        metrics = (await client.get("/metrics")).text
    loop.remove_reader(pair[0])
    body = answer.json()
    assert answer.status_code == 200
    assert base64.b64decode(body["data"][0]["b64_json"]) == b"a picture"
    assert body["timings"] == {"queue_ms": 0.0, "batch_ms": 8.0, "encode_ms": 1.0, "total_ms": 9.0}
    assert "flashbulb_early_answers_total 1.0" in metrics
    view = await context.queue.get(jobs[0].id)
    assert view is not None and view.state.value == "queued"  # nobody cancelled it: a worker has it in hand
    await context.queue.cancel(view.id)
