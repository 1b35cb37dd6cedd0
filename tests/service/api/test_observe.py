"""What the API tells about itself, seen from inside one process."""

from collections.abc import Callable
from pathlib import Path

import httpx2
from fastapi import FastAPI

from flashbulb_service.queue import Limits

MakeApp = Callable[..., FastAPI]


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


async def test_a_method_that_a_client_invents_is_no_new_metric(make_app: MakeApp) -> None:
    """The raw method was a label once: a client could fill the server's memory with invented ones."""
    async with client_of(make_app()) as client:
        for number in range(3):
            assert (await client.request(f"BREW{number}", "/livez")).status_code == 405
        text = (await client.get("/metrics")).text
    assert "BREW" not in text
    assert 'flashbulb_requests_total{method="other",route="unmatched",status="405"} 3.0' in text or (
        'flashbulb_requests_total{method="other",route="/livez",status="405"} 3.0' in text
    )


async def test_refused_requests_are_counted_by_the_limit(make_app: MakeApp) -> None:
    async with client_of(make_app(Limits(max_queued=2))) as client:
        await client.post("/v1/images/generations", json={"prompt": "dog", "n": 3})
        text = (await client.get("/metrics")).text
    assert 'flashbulb_shed_total{reason="queue_full"} 1.0' in text
    assert "flashbulb_ready 0.0" in text  # no worker


async def test_a_blocked_prompt_is_refused_before_anything_is_queued(
    make_app: MakeApp, tmp_path: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("bomb\n")
    app = make_app(blocked_words=words)
    async with client_of(app) as client:
        answer = await client.post("/v1/images/generations", json={"prompt": "a Bomb"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "content_policy_violation"
    assert (await app.state.context.queue.stats()).queued == {}
