"""Webhooks: signed so that the OpenAI client verifies them, tried again, and never sent into a private network."""

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from fastapi import FastAPI
from openai import OpenAI

from flashbulb_service import webhooks
from flashbulb_service.api.jobs import webhook_message
from flashbulb_service.errors import InvalidRequest
from flashbulb_service.jobs import JobError, NewJob
from flashbulb_service.queue import DueHook, Kept, Queue
from flashbulb_service.serve import upkeep
from flashbulb_service.settings import Settings
from flashbulb_service.webhooks import DeliveryError, Message, deliver, is_public, parse_target, retry_delay_s

MakeApp = Callable[..., FastAPI]
SECRET = "whsec_" + "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"
KEY = webhooks.secret_key(SECRET)


class Receiver:
    """A server that writes down what it is sent and answers with the next of its statuses, then with 200."""

    def __init__(self) -> None:
        self.heads: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.statuses: list[int] = []
        self.got = asyncio.Condition()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        head = dict(
            line.lower().split(": ", 1) if "signature" not in line else line.split(": ", 1)
            for line in lines[1:-2]
        )
        body = await reader.readexactly(int(head["content-length"]))
        status = self.statuses.pop(0) if self.statuses else 200
        writer.write(
            f"HTTP/1.1 {status} X\r\nlocation: {self.url}/elsewhere\r\ncontent-length: 0\r\n\r\n".encode()
        )
        await writer.drain()
        writer.close()
        async with self.got:
            self.heads.append(head)
            self.bodies.append(body)
            self.got.notify_all()

    async def wait(self, count: int) -> None:
        async with asyncio.timeout(10), self.got:
            await self.got.wait_for(lambda: len(self.bodies) >= count)


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    async with await asyncio.start_server(made.serve, "127.0.0.1", 0) as server:
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
        yield made


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


async def cancelled_job(app: FastAPI, url: str, **fields: Any) -> str:
    async with client_of(app) as client:
        made = await client.post("/v1/jobs", json={"prompt": "dog", "n": 2, "webhook_url": url, **fields})
        assert made.status_code == 200, made.text
        job_id = str(made.json()["id"])
        await client.delete(f"/v1/jobs/{job_id}")
        return job_id


async def nothing_due(queue: Queue) -> bool:
    return await queue._client.zcard(f"{queue.keys.tag}:hooks") == 0


async def test_the_openai_client_verifies_our_signature(
    make_app: MakeApp, receiver: Receiver, wait_until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    app = make_app(webhook_secret=SECRET, webhook_allow_private=True)
    async with upkeep(app.state.context):
        job_id = await cancelled_job(app, receiver.url)
        await receiver.wait(1)
        await wait_until(partial(nothing_due, app.state.context.queue))
    client = OpenAI(api_key="none", webhook_secret=SECRET)
    event = client.webhooks.unwrap(receiver.bodies[0].decode(), receiver.heads[0])
    assert event.type == "job.cancelled"
    assert json.loads(receiver.bodies[0])["data"]["id"] == job_id
    assert len(receiver.bodies) == 1  # once for the job, not for each picture
    assert SECRET not in caplog.text and SECRET not in repr(app.state.context.settings)


async def test_a_refused_delivery_is_tried_again_under_the_same_id_and_redirects_are_not_followed(
    make_app: MakeApp, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setattr(webhooks, "retry_delay_s", lambda attempt, spread: 0.01 if attempt < 8 else None)
    app = make_app(webhook_secret=SECRET, webhook_allow_private=True)
    receiver.statuses = [500, 302]
    async with upkeep(app.state.context):
        await cancelled_job(app, receiver.url)
        await receiver.wait(3)
        await wait_until(partial(nothing_due, app.state.context.queue))
    assert len({head["webhook-id"] for head in receiver.heads}) == 1
    assert len(receiver.bodies) == 3


async def test_a_due_delivery_outlives_its_process(make_app: MakeApp, receiver: Receiver) -> None:
    settings = {"webhook_secret": SECRET, "webhook_allow_private": True}
    await cancelled_job(make_app(**settings), receiver.url)  # nobody delivers here
    async with upkeep(make_app(**settings).state.context):
        await receiver.wait(1)


async def test_the_end_of_a_replayed_job_is_told_under_an_id_of_its_own(
    make_app: MakeApp, receiver: Receiver
) -> None:
    app = make_app(webhook_secret=SECRET, webhook_allow_private=True)
    queue = app.state.context.queue
    async with upkeep(app.state.context), client_of(app) as client:
        made = (await client.post("/v1/jobs", json={"prompt": "dog", "webhook_url": receiver.url})).json()
        (job,) = await queue.claim("w", [made["model"]], 1, 60.0)
        await queue.fail("w", job, JobError("boom", "the backend broke"), retry=False)
        await receiver.wait(1)
        assert await queue.replay_dead(job.id)
        await client.delete(f"/v1/jobs/{made['id']}")
        await receiver.wait(2)
    assert [json.loads(body)["type"] for body in receiver.bodies] == ["job.failed", "job.cancelled"]
    assert len({head["webhook-id"] for head in receiver.heads}) == 2


async def test_a_receiver_that_never_answers_delays_nobody_elses_deliveries(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight hooks were taken at a time, and the slowest of them, ten seconds, held up everything behind it."""
    leads = []
    for _ in range(webhooks.MAX_CALLS + 2):
        kept = Kept(record=b"what was asked", owner="me", hook=True)
        (lead,) = (await queue.enqueue([NewJob("emoji@1", "64x64", b"p")], keep=kept)).ids
        await queue.cancel(lead)
        leads.append(lead)
    hanging: list[str] = []
    told = asyncio.Event()

    async def message_of(hook: DueHook) -> Message:
        host = "well" if hook.request_id == leads[-1] else "hung"
        return Message(f"http://{host}.example/", hook.request_id, b"{}")

    async def deliver(message: Message, *_: Any, **__: Any) -> int:
        if "hung" in message.url:
            hanging.append(message.id)
            await asyncio.Event().wait()
        told.set()
        return 200

    monkeypatch.setattr(webhooks, "PATIENCE_S", 0.01)
    monkeypatch.setattr(webhooks, "deliver", deliver)
    results: list[str] = []
    delivering = asyncio.create_task(
        webhooks.keep_delivering(queue, message_of, SECRET, allow_private=False, on_attempt=results.append)
    )
    async with asyncio.timeout(10):
        await told.wait()
    assert len(hanging) == webhooks.MAX_CALLS_PER_HOST
    assert "retried" not in results, "who had to wait for a place was not called"
    delivering.cancel()
    await asyncio.wait([delivering])


async def test_what_is_wrong_with_one_webhook_is_logged_and_keeps_no_other_from_being_sent(
    make_app: MakeApp, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unforeseen error of one call ended all webhooks until a restart, without a word."""
    app = make_app(webhook_secret=SECRET, webhook_allow_private=True)
    broken = await cancelled_job(app, receiver.url)

    async def message_of(context: Any, hook: DueHook) -> Message | None:
        if broken.endswith(hook.request_id):
            raise ZeroDivisionError
        return await webhook_message(context, hook)

    monkeypatch.setattr("flashbulb_service.serve.webhook_message", message_of)
    async with upkeep(app.state.context):
        await cancelled_job(app, receiver.url)
        await receiver.wait(1)
    assert broken.removeprefix("job_") in caplog.text and "ZeroDivisionError" in caplog.text


async def test_upkeep_that_ends_by_a_bug_is_logged_and_begins_again(
    make_app: MakeApp, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flashbulb_service.outages.RESTART_S", 0.01)
    app = make_app(webhook_secret=SECRET, webhook_allow_private=True)
    queue, errors = app.state.context.queue, [ZeroDivisionError()]
    due_hooks = queue.due_hooks

    async def broken_once(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return await due_hooks(*args)

    monkeypatch.setattr(queue, "due_hooks", broken_once)
    async with upkeep(app.state.context):
        await cancelled_job(app, receiver.url)
        await receiver.wait(1)
    assert "ZeroDivisionError" in caplog.text


async def test_certificates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read them for each delivery stopped the event loop for 29 to 64 ms."""
    made: list[ssl.SSLContext] = []

    def make() -> ssl.SSLContext:
        made.append(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        return made[-1]

    monkeypatch.setattr(ssl, "create_default_context", make)
    webhooks._tls.cache_clear()
    for _ in range(2):
        with pytest.raises(DeliveryError):  # nobody listens there
            await deliver(Message("https://127.0.0.1:1/", "evt_1", b"{}"), KEY, allow_private=True, now=0)
    webhooks._tls.cache_clear()
    assert len(made) == 1


async def test_unwanted_events_are_not_sent(make_app: MakeApp, receiver: Receiver, wait_until: Any) -> None:
    app = make_app(webhook_secret=SECRET, webhook_allow_private=True)
    job_id = await cancelled_job(app, receiver.url, webhook_events=["job.completed"])
    assert await webhook_message(app.state.context, DueHook(job_id.removeprefix("job_"), attempt=1)) is None
    async with upkeep(app.state.context):
        await wait_until(partial(nothing_due, app.state.context.queue))
    assert receiver.bodies == []


PRIVATE = (
    "http://127.0.0.1/", "http://localhost:80/", "http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/",
    "http://169.254.169.254/latest", "http://10.0.0.1/", "http://192.168.1.1/", "http://0.0.0.0/", "http://100.64.0.1/",
    "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[::ffff:a9fe:a9fe]/", "http://[fe80::1]/", "http://[fd00::1]/",
    "http://[64:ff9b::7f00:1]/", "http://[64:ff9b:1::7f00:1]/", "http://[fec0::1]/", "http://[::7f00:1]/",
    "http://[::127.0.0.1]/", "http://[::ffff:0:127.0.0.1]/", "http://[4000::1]/", "http://[2002:7f00:1::]/",
    "http://metadata.google.internal/", "http://224.0.0.1/",
)  # fmt: skip
BROKEN = (
    "ftp://a.example/", "http://", "http://a.example/\r\nX-Evil: 1", "http://a.example/ x", "http://u:p@a.example/",
    "http://a.example/\u0000", "http://bücher.example/", "http://a.example:99999/",
    "http://a.example/" + "x" * 2_000,
    "//x",
)  # fmt: skip


@pytest.mark.parametrize("url", [*PRIVATE, *BROKEN])
async def test_hostile_addresses_are_refused_at_once(make_app: MakeApp, url: str) -> None:
    async with client_of(make_app(webhook_secret=SECRET)) as client:
        answer = await client.post("/v1/jobs", json={"prompt": "dog", "webhook_url": url})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "webhook_url")
    with pytest.raises(InvalidRequest):
        parse_target(url, allow_private=False)


async def test_a_name_that_leads_to_a_private_address_is_not_called(receiver: Receiver) -> None:
    # The name passes the first check; what it resolves to does not pass the second one.
    port = receiver.url.split(":")[2].split("/")[0]

    async def lead_home(*_: Any, **__: Any) -> Any:
        return [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("127.0.0.1", int(port)))]

    loop = asyncio.get_running_loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(loop), "getaddrinfo", lead_home)
        with pytest.raises(DeliveryError, match="private"):
            message = Message(f"http://rebind.example:{port}/", "evt_1", b"{}")
            await deliver(message, KEY, allow_private=False, now=0)
    assert receiver.bodies == []


async def test_without_a_secret_a_webhook_is_refused(make_app: MakeApp) -> None:
    async with client_of(make_app()) as client:
        answer = await client.post("/v1/jobs", json={"prompt": "dog", "webhook_url": "https://a.example/"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_value")


def test_secrets_have_one_form() -> None:
    for bad in ("", "secret", "whsec_", "whsec_!!!!", "whsec_c2hvcnQ="):
        with pytest.raises(ValueError, match="whsec_<base64"):
            Settings(webhook_secret=bad)


def test_delays_grow_are_bounded_and_end() -> None:
    delays = [retry_delay_s(attempt, 0.5) for attempt in range(1, 9)]
    assert delays == [2, 8, 32, 128, 512, 2048, 3600, None]


def test_public_addresses_are_public() -> None:
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1::1")
