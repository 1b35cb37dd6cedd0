"""A client that leaves takes its jobs along, unless it said that it may come back or somebody else waits for them."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from flashbulb_service.queue import Queue

MakeApp = Callable[..., FastAPI]


class LeavingClient:
    """Speaks ASGI by hand: sends a request and hangs up when told to."""

    def __init__(self, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.hang_up = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self._body = json.dumps(body).encode()
        self._began = False
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/images/generations",
            "raw_path": b"/v1/images/generations",
            "root_path": "",
            "query_string": b"",
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "headers": [
                (b"content-type", b"application/json"),
                *((name.lower().encode(), value.encode()) for name, value in headers.items()),
            ],
        }

    async def receive(self) -> dict[str, Any]:
        if not self._began:
            self._began = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


@pytest.mark.parametrize(
    ("headers", "left"), [({}, 0), ({"Idempotency-Key": "k"}, 3)], ids=["abandoned", "kept-by-key"]
)
async def test_jobs_of_a_client_that_left(
    make_app: MakeApp, wait_until: Callable[..., Any], headers: dict[str, str], left: int
) -> None:
    app = make_app()
    queue: Queue = app.state.context.queue
    client = LeavingClient({"prompt": "dog", "n": 3}, headers)
    serving = asyncio.create_task(app(client.scope, client.receive, client.send))

    async def all_queued() -> bool:
        return sum((await queue.stats()).queued.values()) == 3

    await wait_until(all_queued)
    client.hang_up.set()
    await serving
    assert sum((await queue.stats()).queued.values()) == left
    assert client.sent[0]["status"] == 499


@pytest.mark.parametrize("first_to_leave", [0, 1], ids=["who-asked-first", "who-joined"])
async def test_who_leaves_takes_no_jobs_along_that_another_client_waits_for(
    make_app: MakeApp, wait_until: Callable[..., Any], first_to_leave: int
) -> None:
    """Two users of one app asked for the same; the retry of the second joined the first one's jobs, and got
    409 job_cancelled when the first one closed the tab."""
    app = make_app()
    queue: Queue = app.state.context.queue
    clients = [LeavingClient({"prompt": "cat"}, {"x-stainless-retry-count": count}) for count in "01"]
    serving = []
    for num, client in enumerate(clients, 1):
        serving.append(asyncio.create_task(app(client.scope, client.receive, client.send)))

        async def waited_for(num: int = num) -> bool:
            return sum(map(len, queue._completions._waiters.values())) == num

        await wait_until(waited_for)
    (leaving, staying) = clients if first_to_leave == 0 else clients[::-1]
    leaving.hang_up.set()
    await serving[first_to_leave]
    assert sum((await queue.stats()).queued.values()) == 1
    staying.hang_up.set()
    await asyncio.gather(*serving)
    assert (await queue.stats()).queued == {}
