"""Jobs over HTTP: queued at once, read back, watched, cancelled, listed; seen by their owner only."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request

from flashbulb_service.api import partials
from flashbulb_service.api.jobs import webhook_message
from flashbulb_service.errors import NewerMessage
from flashbulb_service.jobs import NewJob
from flashbulb_service.queue import DueHook
from flashbulb_service.serve import upkeep
from flashbulb_service.tasks import ImageOutcome
from flashbulb_service.wire import WIRE

MakeApp = Callable[..., FastAPI]


def events_of(lines: Iterator[str]) -> list[dict[str, Any]]:
    """Read a whole event stream."""
    events: list[dict[str, Any]] = [{}]
    for line in lines:
        name, _, value = line.partition(": ")
        if not line:
            events.append({})
        elif name in ("event", "id", "data"):
            events[-1][name] = json.loads(value) if name == "data" else value
    return [event for event in events if event]


def watch(http: httpx2.Client, job_id: str, **headers: str) -> list[dict[str, Any]]:
    with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events_of(answer.iter_lines())


def test_a_job_is_watched_to_its_end_and_has_the_pictures_of_the_images_route(http: httpx2.Client) -> None:
    body = {"prompt": "red apple", "n": 2, "seed": 5, "metadata": {"order": "17"}}
    made = http.post("/v1/jobs", json=body)
    assert made.status_code == 200
    job = made.json()
    assert job["object"] == "job" and job["metadata"] == {"order": "17"}
    events = watch(http, job["id"])
    assert events[0]["event"] == "job.status"
    assert events[-1]["event"] == "job.completed"
    kinds = [event["event"] for event in events[1:-1]]
    assert [kinds.count(f"picture.{kind}") for kind in ("queued", "running", "done")] == [2, 2, 2]
    ended = http.get(f"/v1/jobs/{job['id']}").json()
    assert (ended["status"], ended["progress"]) == ("completed", 100)
    urls = http.post(
        "/v1/images/generations", json={**body, "metadata": None, "response_format": "url"}
    ).json()
    for mine, theirs in zip(ended["data"], urls["data"], strict=True):
        assert http.get(mine["url"]).content == http.get(theirs["url"]).content


def test_a_job_of_several_steps_tells_where_its_previews_are(http: httpx2.Client) -> None:
    body = {"model": "tiny-few", "prompt": "dog", "n": 2, "seed": 5, "steps": 2, "partial_images": 3}
    made = http.post("/v1/jobs", json=body)
    assert "x-flashbulb-warning" not in made.headers
    events = watch(http, made.json()["id"])
    shown = [event["data"] for event in events if event["event"] == "picture.preview"]
    assert sorted((one["index"], one["partial_image_index"], one["step"], one["steps"]) for one in shown) == [
        (0, 0, 1, 2),
        (1, 0, 1, 2),
    ]
    pictures = {http.get(one["url"]).content for one in [*shown, *events[-1]["data"]["data"]]}
    assert len(pictures) == 4


async def test_watching_goes_on_behind_the_last_event_seen(make_app: MakeApp) -> None:
    app = make_app()
    queue = app.state.context.queue
    async with client_of(app) as client:
        job = (await client.post("/v1/jobs", json={"prompt": "dog"})).json()
        (claimed,) = await queue.claim("w", [job["model"]], 1, 5.0)
        await queue.progress("w", claimed, "half")
        await queue.cancel(claimed.id)
        ids = [
            event.id for event in [e async for e in first(queue.watch(claimed.id, after="0", quiet_s=5), 3)]
        ]
        answer = await client.get(f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": ids[1]})
    events = events_of(iter(answer.text.splitlines()))
    assert [event["event"] for event in events] == [
        "job.status",
        "picture.progress",
        "picture.cancelled",
        "job.cancelled",
    ]


async def first(events: Any, count: int) -> Any:
    async for event in events:
        yield event
        count -= 1
        if not count:
            break
    await events.aclose()


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


async def test_a_queued_job_tells_its_position_and_is_cancelled_once(make_app: MakeApp) -> None:
    async with client_of(make_app()) as client:
        jobs = [(await client.post("/v1/jobs", json={"prompt": "dog"})).json() for _ in range(3)]
        assert [job["status"] for job in jobs] == ["queued"] * 3
        assert [job["queue_position"] for job in jobs] == [0, 1, 2]
        for _ in range(2):
            answer = await client.delete(f"/v1/jobs/{jobs[0]['id']}")
            assert answer.json()["status"] == "cancelled"
        assert (await client.get(f"/v1/jobs/{jobs[1]['id']}")).json()["queue_position"] == 0
        events = await client.get(f"/v1/jobs/{jobs[0]['id']}/events")
        assert events_of(iter(events.text.splitlines()))[-1]["event"] == "job.cancelled"


async def test_a_request_tells_when_its_first_picture_goes(make_app: MakeApp) -> None:
    """Of a request with a replayed job it told when the last one goes; the others' files were gone long before."""
    app = make_app()
    queue, now = app.state.context.queue, float(int(time.time()))
    outcome = ImageOutcome(file="a.png", batch_size=1, batch_ms=1.0, encode_ms=1.0, bundle_sha256="0")
    async with client_of(app) as client:
        made = (await client.post("/v1/jobs", json={"prompt": "dog", "n": 2})).json()
        for ago_s in (3600.0, 0.0):
            [job] = await queue.claim("w", [made["model"]], 1, 60.0)
            await queue.complete("w", job, outcome.to_bytes(), now=now - ago_s)
        told = (await client.get(f"/v1/jobs/{made['id']}")).json()
    assert told["status"] == "completed" and told["completed_at"] == int(now)
    assert told["expires_at"] == int(now - 3600 + app.state.context.settings.results_ttl_s)


async def test_deadlines_pass_while_there_is_no_worker(make_app: MakeApp) -> None:
    """Only workers ended what was overdue: without one it held its place in the queue for ever."""
    app = make_app(lease_s=0.01)
    queue = app.state.context.queue
    [job_id] = (await queue.enqueue([NewJob("tiny@1", "64x64", b"p", deadline_s=0.001)])).ids
    async with upkeep(app.state.context):
        [view] = await queue.wait([job_id], 10)
    assert view.error is not None and view.error.code == "deadline_exceeded"
    assert (await queue.stats()).queued == {}


async def test_jobs_are_listed_page_by_page(make_app: MakeApp) -> None:
    async with client_of(make_app()) as client:
        ids = [(await client.post("/v1/jobs", json={"prompt": "dog"})).json()["id"] for _ in range(5)]
        page = (await client.get("/v1/jobs", params={"limit": 2, "order": "asc"})).json()
        assert ([job["id"] for job in page["data"]], page["has_more"]) == (ids[:2], True)
        page = (await client.get("/v1/jobs", params={"after": ids[2], "order": "asc"})).json()
        assert ([job["id"] for job in page["data"]], page["has_more"]) == (ids[3:], False)
        newest = (await client.get("/v1/jobs")).json()
        assert newest["first_id"] == ids[-1]
        assert (await client.get("/v1/jobs", params={"limit": 101})).status_code == 400


async def test_a_later_versions_job_is_unavailable_here_and_does_not_hide_the_others(
    make_app: MakeApp,
) -> None:
    app = make_app()
    queue = app.state.context.queue
    async with client_of(app) as client:
        mine, later = [(await client.post("/v1/jobs", json={"prompt": word})).json()["id"] for word in "ab"]
        record = {"task": "text-to-dance", "wire": WIRE + 1}
        async with queue.commands() as redis:
            await redis.hset(queue.keys.job(later.removeprefix("job_")), "record", json.dumps(record))
        answer = await client.get(f"/v1/jobs/{later}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "newer_version")
        assert int(answer.headers["retry-after-ms"]) > 0
        assert [job["id"] for job in (await client.get("/v1/jobs")).json()["data"]] == [mine]
        assert await webhook_message_of(app, mine) is None  # it has no webhook
        with pytest.raises(NewerMessage):
            await webhook_message_of(app, later)


async def webhook_message_of(app: FastAPI, job_id: str) -> Any:
    return await webhook_message(app.state.context, DueHook(job_id.removeprefix("job_"), attempt=1))


async def test_another_owners_job_is_not_found(make_app: MakeApp) -> None:
    app = make_app()

    @app.middleware("http")
    async def who(request: Request, call_next: Any) -> Any:
        request.state.tenant = request.headers.get("x-test-tenant", "default")
        return await call_next(request)

    async with client_of(app) as client:
        mine = {"x-test-tenant": "me"}
        job_id = (await client.post("/v1/jobs", json={"prompt": "dog"}, headers=mine)).json()["id"]
        assert (await client.get(f"/v1/jobs/{job_id}", headers=mine)).status_code == 200
        for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events"):
            assert (await client.get(path)).status_code == 404
        assert (await client.delete(f"/v1/jobs/{job_id}")).status_code == 404
        assert (await client.get("/v1/jobs")).json()["data"] == []


async def test_streams_are_bounded(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partials, "MAX_STREAMS", 0)
    async with client_of(make_app()) as client:
        job_id = (await client.post("/v1/jobs", json={"prompt": "dog"})).json()["id"]
        answer = await client.get(f"/v1/jobs/{job_id}/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_streams")


@pytest.mark.parametrize(
    "job_id", ["x", "job_x", "..%2f..%2fetc", "job_" + "0" * 32, "job_" + "0" * 9_000, "%00"]
)
def test_a_job_that_is_not_there_is_404(http: httpx2.Client, job_id: str) -> None:
    for answer in (http.get(f"/v1/jobs/{job_id}"), http.delete(f"/v1/jobs/{job_id}")):
        assert answer.status_code == 404
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert http.get("/v1/jobs", params={"after": "job_x"}).status_code == 404
