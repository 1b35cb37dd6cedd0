"""Hostile input: each gets a clear 4xx or a correct 200, in bounded time."""

import asyncio
import json
import time
from collections.abc import Callable

import httpx2
import pytest
from fastapi import FastAPI

from flashbulb_service.api.middleware import MAX_UPLOADS

MakeApp = Callable[..., FastAPI]
ROUTE = "/v1/images/generations"
MAX_SECONDS = 5.0  # measured: under 0.2 s each


def post(http: httpx2.Client, content: bytes) -> httpx2.Response:
    start = time.monotonic()
    answer = http.post(ROUTE, content=content, headers={"content-type": "application/json"})
    assert time.monotonic() - start < MAX_SECONDS
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, "body_too_large"),
        (b'{"prompt": ' + b"[" * 9_000 + b"]" * 9_000 + b"}", 400, None),
        (b'{"prompt": "dog", "svg": ' + b'{"a":' * 3_000 + b"1" + b"}" * 3_000 + b"}", 400, None),
        (b'{"prompt": "a\\u0000b"}', 400, "invalid_value"),
        (b'{"prompt": "\\ud800"}', 400, "invalid_value"),
        (b'{"prompt": "dog", "\\ud800": 1}', 400, "invalid_value"),
        (b'{"prompt": "dog", "' + b"k" * 15_000 + b'": 1}', 400, "unknown_parameter"),
        (b'{"prompt": "dog", "model": "../../etc/passwd"}', 404, "model_not_found"),
        (b'{"prompt": "dog", "model": "\\ud800"}', 400, "invalid_value"),
        (b'{"prompt": "dog", "size": "\\u0661x\\u0661", "size_policy": "nearest"}', 400, "invalid_size"),
        (b'{"prompt": "dog", "seed": 9223372036854775808}', 400, "integer_above_max_value"),
        (b'{"prompt": "dog", "seed": -9223372036854775808}', 400, "integer_below_min_value"),
        (b'{"prompt": "dog", "seed": ' + b"9" * 5_000 + b"}", 400, None),
        (b'{"prompt": "dog", "seed": 1e400}', 400, "invalid_type"),
        (b'{"prompt": "dog", "guidance_scale": NaN}', 400, None),
        (b'{"prompt": "dog", "metadata": {"a": {"b": 1}}}', 400, "invalid_type"),
        (
            b'{"prompt": "dog", "metadata": ' + json.dumps({str(i): "" for i in range(17)}).encode() + b"}",
            400,
            None,
        ),
        (b'{"prompt": "dog", "user": "\\ud800"}', 400, "invalid_value"),
        (b'{"prompt": "dog", "metadata": {"\\ud800": "a"}}', 400, "invalid_value"),
        (b'{"prompt": "dog", "metadata": {"a": "\\ud800"}}', 400, "invalid_value"),
    ],
    ids=range(20),
)
def test_hostile_body_gets_a_clear_answer(
    http: httpx2.Client, content: bytes, status: int, code: str | None
) -> None:
    answer = post(http, content)
    assert answer.status_code == status, answer.text
    assert len(answer.content) < 3_000
    assert code in (None, answer.json()["error"]["code"])


@pytest.mark.parametrize(
    "value", [b'{"a":' * 300 + b"1" + b"}" * 300, b'{"\\ud800": 1}'], ids=["deep", "lone"]
)
@pytest.mark.parametrize("header", ["idempotency-key", "x-stainless-retry-count"])
def test_a_field_without_effect_may_be_anything_also_under_a_key(
    http: httpx2.Client, header: str, value: bytes
) -> None:
    """The digest of a request wrote it as JSON again, which cannot be done: a 500."""
    headers = {"content-type": "application/json", header: "1"}
    answer = http.post(ROUTE, content=b'{"prompt": "dog", "svg": ' + value + b"}", headers=headers)
    assert (answer.status_code, answer.headers["x-flashbulb-warning"]) == (200, "ignored: svg")


@pytest.mark.parametrize("prompt", ["🍎🧑‍🚀", "\u202eتفاحة حمراء", "\ufeff\u200b apple", "a\r\nX-Evil: 1"])
def test_unusual_text_is_drawn(http: httpx2.Client, prompt: str) -> None:
    answer = post(http, json.dumps({"prompt": prompt, "user": prompt, "metadata": {prompt: prompt}}).encode())
    assert answer.status_code == 200


def test_extreme_seeds_are_drawn_and_echoed(http: httpx2.Client) -> None:
    for seed in (0, 2**63 - 1):
        answer = post(http, json.dumps({"prompt": "dog", "seed": seed}).encode())
        assert answer.json()["data"][0]["seed"] == seed


@pytest.mark.parametrize("name", ["../a.png", "%2e%2e%2fa.png", "..%5ca.png", "a%00.png", "a.png%0d%0aX: 1"])
def test_paths_in_names_lead_nowhere(http: httpx2.Client, name: str) -> None:
    assert http.get(f"/v1/images/results/{name}").status_code == 404


def test_only_sane_client_request_ids_are_echoed(http: httpx2.Client) -> None:
    for given, echoed in (("abc-123", "abc-123"), ("a b", None), ("x" * 200, None), ("é", None)):
        answer = http.get("/livez", headers={"x-client-request-id": given.encode()})
        assert answer.headers.get("x-client-request-id") == echoed


async def test_uploads_of_all_clients_together_are_bounded_and_small_bodies_go_on(make_app: MakeApp) -> None:
    """Each was held whole, 32 MiB and more, by as many clients as there were."""
    full, route, form = 200_000, "/v1/images/edits", {"content-type": "multipart/form-data; boundary=x"}
    app = make_app(max_upload_bytes=full, max_body_bytes=full)
    arrived, go_on = asyncio.Semaphore(0), asyncio.Event()

    async def slowly():  # type: ignore[no-untyped-def]
        yield b"a" * (full - 1)
        arrived.release()
        await go_on.wait()
        yield b"a"

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
        for left in (False, True):  # what it takes is given back at the end, and when the client leaves
            go_on.clear()
            uploads = [
                asyncio.create_task(client.post(route, content=slowly(), headers=form))
                for _ in range(MAX_UPLOADS)
            ]
            for _ in uploads:
                await arrived.acquire()
            answer = await client.post(route, content=b"a" * (full // 2), headers=form)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_uploads")
            assert int(answer.headers["retry-after"]) >= 1
            small = await client.post("/v1/jobs", json={"prompt": "dog"})
            assert small.status_code == 200
            if left:
                for upload in uploads:
                    upload.cancel()
            go_on.set()
            ended = await asyncio.gather(*uploads, return_exceptions=True)
            assert left or [one.status_code for one in ended] == [400] * MAX_UPLOADS  # type: ignore[union-attr]
        answer = await client.post(route, content=b"a" * full, headers=form)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_body")


async def test_body_that_comes_too_slowly_is_408(make_app: MakeApp) -> None:
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(make_app(body_timeout_s=0.05)), base_url="http://test"
    ) as client:

        async def drip():  # type: ignore[no-untyped-def]
            yield b'{"prompt": '

            await asyncio.Event().wait()

        answer = await client.post(ROUTE, content=drip(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "request_timeout")
