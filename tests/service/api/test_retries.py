"""Requests that come again: by key, by a client library's own retry; and streams of the unmodified client."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI

from flashbulb_service.queue import Limits

MakeApp = Callable[..., FastAPI]
ROUTE = "/v1/images/generations"


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


def test_replayed_answer_has_the_same_bytes_and_says_so(http: httpx2.Client) -> None:
    body = {"prompt": "green rocket", "n": 2}
    first, second = (http.post(ROUTE, json=body, headers={"Idempotency-Key": "twice"}) for _ in range(2))
    assert first.content == second.content
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    in_body = http.post(ROUTE, json={**body, "idempotency_key": "twice"})
    assert in_body.content == first.content


async def test_a_repeated_request_joins_the_running_one(make_app: MakeApp, wait_until: Any) -> None:
    app = make_app()
    queue = app.state.context.queue

    async def queued() -> bool:
        return sum((await queue.stats()).queued.values()) == 1

    async with client_of(app) as client:
        send = {"json": {"prompt": "dog"}, "headers": {"Idempotency-Key": "k"}}
        first = asyncio.create_task(client.post(ROUTE, **send))
        await wait_until(queued)
        second = asyncio.create_task(client.post(ROUTE, **send))
        third = await client.post("/v1/jobs", json={"prompt": "dog"}, headers={"Idempotency-Key": "other"})
        await queue.cancel(third.json()["id"].removeprefix("job_"))
        (job,) = await queue.claim("w", [third.json()["model"]], 8, 5.0)
        await queue.cancel(job.id)
        assert [(await answer).status_code for answer in (first, second)] == [409, 409]


async def test_the_same_words_on_another_route_are_another_request(make_app: MakeApp) -> None:
    """An answer of the images route was the pictures of a job, which ended when that client left."""
    app = make_app(request_timeout_s=0.05)
    async with client_of(app) as client:
        send = {"json": {"prompt": "dog"}, "headers": {"Idempotency-Key": "k"}}
        job = (await client.post("/v1/jobs", **send)).json()["id"]
        answer = await client.post(ROUTE, **send)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")
        retried = {"json": {"prompt": "cat"}, "headers": {"x-stainless-retry-count": "1"}}
        job = (await client.post("/v1/jobs", **retried)).json()["id"]
        assert (await client.post(ROUTE, **retried)).status_code == 504
        assert (await client.get(f"/v1/jobs/{job}")).json()["status"] == "queued"


async def test_only_a_retry_joins_an_equal_request_without_a_key(make_app: MakeApp) -> None:
    app = make_app()
    async with client_of(app) as client:

        async def post(count: str) -> str:
            headers = {"x-stainless-retry-count": count}
            answer = await client.post("/v1/jobs", json={"prompt": "dog"}, headers=headers)
            return str(answer.json()["id"])

        first, second = await post("0"), await post("0")
        assert first != second
        assert await post("1") == second == await post("2")
        await client.delete(f"/v1/jobs/{second}")
        assert await post("1") not in (first, second)


async def test_the_client_library_retries_a_full_queue_three_times_in_all(
    make_app: MakeApp,
) -> None:
    app = make_app(Limits(max_queued=1, default_retry_after_s=0.1))
    asked: list[str | None] = []

    async def count(request: httpx2.Request) -> None:
        asked.append(request.headers.get("x-stainless-retry-count"))

    transport = httpx2.ASGITransport(app)
    inner = httpx2.AsyncClient(transport=transport, event_hooks={"request": [count]})
    async with AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=inner) as client:
        with pytest.raises(openai.RateLimitError):
            await client.images.generate(prompt="dog", n=2)
        assert asked == ["0", "1", "2"]
        asked.clear()
        with pytest.raises(openai.BadRequestError):
            await client.images.generate(prompt="")
        assert asked == ["0"]


def test_one_step_student_streams_its_picture_only(openai_client: OpenAI) -> None:
    whole = openai_client.images.generate(prompt="dog", extra_body={"seed": 3}).data
    with openai_client.images.generate(
        prompt="dog", stream=True, partial_images=2, extra_body={"seed": 3}
    ) as stream:
        events = list(stream)
    assert whole is not None
    assert [event.type for event in events] == ["image_generation.completed"]
    assert events[0].b64_json == whole[0].b64_json
    assert events[0].usage.total_tokens == events[0].usage.input_tokens + 16  # type: ignore[union-attr]


def test_few_step_student_streams_previews_before_its_picture(openai_client: OpenAI) -> None:
    asked = {"seed": 3, "steps": 4}
    whole = openai_client.images.generate(model="tiny-few", prompt="dog", extra_body=asked).data
    with openai_client.images.generate(
        model="tiny-few", prompt="dog", stream=True, partial_images=2, extra_body=asked
    ) as stream:
        first, second, last = stream
    assert whole is not None
    assert [first.type, second.type, last.type] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]
    assert [first.partial_image_index, second.partial_image_index] == [0, 1]  # type: ignore[union-attr]
    assert last.b64_json == whole[0].b64_json
    assert len({first.b64_json, second.b64_json, last.b64_json}) == 3
    assert base64.b64decode(first.b64_json).startswith(b"\x89PNG")


async def test_async_client_streams_one_event_per_picture(server_url: str) -> None:
    async with AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
        stream = await client.images.generate(prompt="dog", n=3, stream=True)
        events = [event async for event in stream]
    assert len({event.b64_json for event in events}) == 3
    assert base64.b64decode(events[0].b64_json).startswith(b"\x89PNG")


async def test_error_inside_a_stream_is_raised_by_the_client(make_app: MakeApp) -> None:
    app = make_app(request_timeout_s=0.05)
    inner = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
    async with AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=inner) as client:
        with pytest.raises(openai.APIError) as caught:
            async for _ in await client.images.generate(prompt="dog", stream=True):
                pass
    assert caught.value.code == "deadline_exceeded"
    assert (await app.state.context.queue.stats()).queued == {}


async def test_client_timeout_is_typed(server_url: str) -> None:
    """The model is paused, so that no server is fast enough."""
    paused = f"{server_url}/v1/admin/queue/models/tiny"
    async with (
        httpx2.AsyncClient() as operator,
        AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", timeout=0.2, max_retries=0) as client,
    ):
        assert (await operator.post(f"{paused}/pause")).status_code == 200
        try:
            with pytest.raises(openai.APITimeoutError):
                await client.images.generate(prompt="dog")
        finally:
            assert (await operator.post(f"{paused}/resume")).status_code == 200
