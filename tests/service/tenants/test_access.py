"""Who may come in: every route, every form of header, every address to listen on."""

import base64
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from flashbulb_service.api import partials
from flashbulb_service.api.gate import Gate, bearer, check_local, duration
from flashbulb_service.errors import InvalidApiKey, InvalidRequest, MissingScope, QueueUnavailable
from flashbulb_service.jobs import NewJob
from flashbulb_service.queue import Queue
from flashbulb_service.tenants.access import Access, is_loopback, settle_auth
from flashbulb_service.tenants.keys import KeyLimits, new_key_id, new_secret
from flashbulb_service.tenants.store import KeyStore

ClientOf = Callable[..., httpx2.AsyncClient]

OPEN = {
    "/", "/livez", "/readyz", "/openapi.json", "/v1/images/results/{name}",
    "/ui/playground.js", "/ui/server.js", "/ui/request.js", "/ui/run.js", "/ui/video.js",
    "/ui/playground.css", "/ui/icon.svg",
}  # fmt: skip


def check_error(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return dict(answer.json()["error"])


def all_routes(app: FastAPI) -> list[tuple[str, str]]:
    """Every route that the app really has, also those that its document does not tell."""
    found = []

    def walk(routes: Any) -> None:
        for route in routes:
            if hasattr(route, "effective_candidates"):
                walk(route.effective_candidates())
            elif hasattr(route, "methods") and route.methods:
                found.extend((method, route.path) for method in route.methods)
            elif hasattr(route, "routes"):
                walk(route.routes)

    walk(app.routes)
    return sorted(set(found))


async def test_every_route_but_the_open_ones_needs_a_key(
    app: FastAPI, client_of: ClientOf, keys: KeyStore
) -> None:
    routes = all_routes(app)
    documented = set(app.openapi()["paths"])
    assert documented <= {path for _, path in routes} and len(routes) > 25
    drawing = await keys.create("drawing", ["generate"])
    running = await keys.create("running", ["admin"])
    unknown = new_secret(new_key_id())
    admin = 0
    async with client_of(app) as client:
        for method, path in routes:
            for given, status, code in (
                (None, 401, "invalid_api_key"),
                (unknown, 401, "invalid_api_key"),
                (drawing.secret, 403, "missing_scope"),
                (running.secret, 403, "missing_scope"),
            ):
                headers = {"authorization": f"Bearer {given}"} if given else {}
                answer = await client.request(method, path, headers=headers)
                is_admin = path == "/metrics" or path.startswith("/v1/admin")
                admin += is_admin
                right = {drawing.secret: not is_admin, running.secret: is_admin}.get(given or "", False)
                if path in OPEN or right:
                    assert answer.status_code not in (401, 403), (method, path, given)
                elif method == "HEAD":
                    assert answer.status_code == status
                else:
                    check_error(answer, status, code)
                    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert admin == 4 * 16


async def test_a_path_that_nobody_serves_tells_nothing_without_a_key(
    app: FastAPI, client_of: ClientOf
) -> None:
    async with client_of(app) as client:
        for path in (
            "/v1",
            "/nope",
            "/v1/admin",
            "/v1/../metrics",
            "/livez/",
            "/ui",
            "/METRICS",
        ):
            answer = await client.get(path)
            assert answer.status_code in (401, 404, 307), path
            assert b"flashbulb_requests" not in answer.content


async def test_refusal_comes_before_the_body_is_read(app: FastAPI, keys: KeyStore) -> None:
    drained = await keys.create("a", limits=KeyLimits(requests_per_minute=1))
    await keys.admit(drained.record, drained.secret)

    async def no_body() -> Any:
        raise AssertionError("the body was read")

    for secret, status in ((None, 401), (new_secret(new_key_id()), 401), (drained.secret, 429)):
        sent: list[Any] = []

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {secret}".encode())] if secret else []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/images/generations",
            "headers": [*headers, (b"content-length", b"999999999999")],
            "query_string": b"",
        }
        await app(scope, no_body, send)
        assert sent[0]["status"] == status


async def test_broken_json_without_a_key_is_401_and_not_400(app: FastAPI, client_of: ClientOf) -> None:
    async with client_of(app) as client:
        answer = await client.post(
            "/v1/images/generations", content=b"{", headers={"content-type": "application/json"}
        )
        check_error(answer, 401, "invalid_api_key")


async def test_a_revoked_admin_key_has_no_second_left_to_make_another(
    app: FastAPI, client_of: ClientOf, keys: KeyStore
) -> None:
    """`keys` is another process: the app, which knows the key from a moment ago, does not hear of it."""
    admin = await keys.create("a", ["admin", "generate"])
    async with client_of(app, admin.secret) as client:
        assert (await client.get("/v1/models")).status_code == 200
        await keys.revoke(admin.record.id)
        answer = await client.post("/v1/admin/keys", json={"name": "heir", "scopes": ["admin"]})
        check_error(answer, 401, "invalid_api_key")
    assert not await keys.any_active()


# ------------------------------------------------------------------------------------------------- headers

SECRET = new_secret(new_key_id())
header_text = st.one_of(
    st.text(st.characters(max_codepoint=255), max_size=300),
    st.sampled_from(
        ["", "Bearer", "Bearer ", f"Basic {SECRET}", SECRET, f"Bearer  {SECRET}", f"bearer\t{SECRET}",
         f"Bearer {SECRET}x", f"Bearer {SECRET} {SECRET}", f"Bearer {SECRET}\x00", "Bearer " + "a" * 10_000]
    ),
)  # fmt: skip


@given(values=st.lists(header_text, max_size=3))
def test_any_authorization_header_is_read_or_refused(values: list[str]) -> None:
    headers = Headers(raw=[(b"authorization", value.encode("latin-1")) for value in values])
    try:
        secret = bearer(headers)
    except InvalidApiKey:
        return
    assert len(values) == 1 and values[0].strip(" ").lower().startswith("bearer")
    assert secret in values[0]


async def test_scheme_is_read_in_any_case_and_wrong_headers_are_401(
    app: FastAPI, client_of: ClientOf, keys: KeyStore
) -> None:
    made = await keys.create("a")
    basic = base64.b64encode(f"{made.secret}:".encode()).decode()
    cut = made.secret[:-1] + secrets.choice("ab" if made.secret[-1] not in "ab" else "cd")
    async with client_of(app) as client:

        async def status(*values: str | bytes) -> int:
            headers = [("authorization", value) for value in values]
            return (await client.get("/v1/models", headers=headers)).status_code  # type: ignore[arg-type]

        good = [f"Bearer {made.secret}", f"bearer {made.secret}", f"BEARER  {made.secret}"]
        assert [await status(value) for value in good] == [200] * 3
        bad = [
            made.secret,
            f"Basic {basic}",
            f"Bearer {cut}",
            f"Bearer {made.record.id}",
            "Bearer none",
            b"\xff\xfe",
        ]
        assert [await status(value) for value in bad] == [401] * len(bad)
        assert await status(good[0], good[0]) == 401


async def test_secret_is_never_logged(
    app: FastAPI, client_of: ClientOf, keys: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    admin = await keys.create("a", ["admin"])
    async with client_of(app, admin.secret) as client:
        made = (await client.post("/v1/admin/keys", json={"name": "b"})).json()
        rotated = (await client.post(f"/v1/admin/keys/{made['id']}/rotate", json={})).json()
        await client.get("/v1/models", headers={"authorization": f"Bearer {made['secret']}x"})
    assert made["id"] in caplog.text
    for secret in (admin.secret, made["secret"], rotated["secret"]):
        assert secret[-43:] not in caplog.text


# ----------------------------------------------------------------------------------------- limits on the wire


async def test_answers_tell_where_a_key_stands_and_429_when_to_come_again(
    app: FastAPI, client_of: ClientOf, keys: KeyStore
) -> None:
    made = await keys.create("a", limits=KeyLimits(requests_per_minute=1, burst=2))
    async with client_of(app, made.secret) as client:
        first = await client.post("/v1/jobs", json={"prompt": "dog"})
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] == "1m0s"
        bad = await client.post("/v1/jobs", json={"prompt": ""})
        assert (bad.status_code, bad.headers["x-ratelimit-remaining-requests"]) == (400, "0")
        refused = await client.post("/v1/jobs", json={"prompt": "dog"})
        error = check_error(refused, 429, "rate_limit_exceeded")
        assert error["type"] == "rate_limit_error"
        assert 50 <= int(refused.headers["retry-after"]) <= 60
        assert 50_000 <= int(refused.headers["retry-after-ms"]) <= 60_000
        assert "x-should-retry" not in refused.headers
        assert (await client.get("/v1/jobs")).status_code == 200  # reading is free


async def test_spent_budget_is_429_that_no_library_retries(
    app: FastAPI, client_of: ClientOf, keys: KeyStore, queue: Queue
) -> None:
    made = await keys.create("a", limits=KeyLimits(budget_ms=5))
    await queue.enqueue([NewJob("tiny@1", "b", b"p", tenant=made.record.id)])
    [claimed] = await queue.claim("w", ["tiny@1"], 1, 60)
    await queue.complete("w", claimed, b"r", device_ms=5)
    async with client_of(app, made.secret) as client:
        refused = await client.post("/v1/jobs", json={"prompt": "dog"})
        check_error(refused, 429, "budget_exceeded")
        assert refused.headers["x-should-retry"] == "false" and int(refused.headers["retry-after"]) >= 1
    assert b'flashbulb_shed_total{reason="budget_exceeded"} 1.0' in app.state.context.metrics.exposition()


async def test_a_request_is_its_keys_and_nobody_elses(
    app: FastAPI, client_of: ClientOf, keys: KeyStore, queue: Queue
) -> None:
    one, other = await keys.create("one", limits=KeyLimits(max_live=3)), await keys.create("other")
    body = {"prompt": "dog", "n": 2, "user": "somebody"}
    async with client_of(app, one.secret) as mine, client_of(app, other.secret) as theirs:
        job = (await mine.post("/v1/jobs", json=body)).json()
        check_error(await mine.post("/v1/jobs", json={**body, "user": "else"}), 429, "concurrency_exceeded")
        assert (await theirs.post("/v1/jobs", json=body)).status_code == 200
        check_error(await theirs.get(f"/v1/jobs/{job['id']}"), 404, "job_not_found")
        check_error(await theirs.delete(f"/v1/jobs/{job['id']}"), 404, "job_not_found")
        assert (await mine.get(f"/v1/jobs/{job['id']}")).json()["status"] == "queued"
    jobs = await queue.claim("w", ["tiny@1"], 8, 60)
    assert {job.tenant for job in jobs} == {one.record.id, other.record.id}


async def test_weight_is_a_share_of_contended_time(
    app: FastAPI, client_of: ClientOf, keys: KeyStore, queue: Queue
) -> None:
    heavy = await keys.create("heavy", limits=KeyLimits(weight=3))
    light = await keys.create("light", limits=KeyLimits(weight=1))
    for key in (light, heavy):
        async with client_of(app, key.secret) as client:
            for _ in range(4):
                assert (await client.post("/v1/jobs", json={"prompt": "dog", "n": 10})).status_code == 200
    first = [job.tenant for _ in range(24) for job in await queue.claim("w", ["tiny@1"], 1, 60)]
    assert 16 <= first.count(heavy.record.id) <= 20


async def test_one_key_has_a_share_of_the_event_streams_and_leaves_others_theirs(
    app: FastAPI, client_of: ClientOf, keys: KeyStore, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams are read, so they cost no request of a key's rate: one key could hold all of a process's."""
    monkeypatch.setattr(partials, "MAX_STREAMS_OF_KEY", 1)
    one, other = await keys.create("one"), await keys.create("other")
    async with client_of(app, one.secret) as mine, client_of(app, other.secret) as theirs:
        ids = [(await who.post("/v1/jobs", json={"prompt": "dog"})).json()["id"] for who in (mine, theirs)]
        for who, job in zip((mine, theirs), ids, strict=True):
            await who.delete(f"/v1/jobs/{job}")  # its events are told, and end
        watching = queue.watch(ids[0].removeprefix("job_"), after="0", quiet_s=5, owner=one.record.id)
        assert await anext(watching) is not None
        refused = await mine.get(f"/v1/jobs/{ids[0]}/events")
        error = check_error(refused, 429, "too_many_streams")
        assert "1 event streams of your key" in error["message"] and int(refused.headers["retry-after"]) >= 1
        counted = app.state.context.metrics.exposition()
        assert b'flashbulb_shed_total{reason="too_many_streams"} 1.0' in counted
        assert (await theirs.get(f"/v1/jobs/{ids[1]}/events")).status_code == 200
        await watching.aclose()
        assert (await mine.get(f"/v1/jobs/{ids[0]}/events")).status_code == 200


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.02, "20ms"), (1.5, "1.5s"), (360, "6m0s"), (7203, "2h0m3s")]
)
def test_times_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --------------------------------------------------------------------------------------- modes and addresses


async def test_without_keys_anyone_on_this_machine_may_use_everything(
    make_app: Callable[..., FastAPI], client_of: ClientOf
) -> None:
    async with client_of(make_app()) as client:
        for path in ("/v1/models", "/metrics", "/v1/admin/queue"):
            assert (await client.get(path)).status_code == 200
            ignored = await client.get(path, headers={"authorization": "Bearer none"})
            assert ignored.status_code == 200


async def test_a_foreign_page_cannot_administrate_through_a_visitors_browser(
    make_app: Callable[..., FastAPI], client_of: ClientOf
) -> None:
    async with client_of(make_app()) as client:
        for headers in (
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"origin": "http://127.0.0.1:9999"},
        ):
            answer = await client.post("/v1/admin/queue/models/tiny/drain", headers=headers)
            check_error(answer, 403, "missing_scope")
        for headers in (
            {"host": "evil.example:8000"},
            {"host": "evil.example", "origin": "http://evil.example"},
        ):
            answer = await client.post("/v1/admin/queue/models/tiny/drain", headers=headers)
            check_error(answer, 421, "wrong_host")
        own = {"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}
        assert (await client.post("/v1/admin/queue/models/tiny/drain", headers=own)).status_code == 200
    for host in ("localhost", "localhost:80", "127.0.0.1", "[::1]:8000"):
        check_local(Headers({"host": host}))
    for host in ("", "127.0.0.1.evil.example", "::1", "[", "localhost.evil"):
        with pytest.raises(MissingScope):
            check_local(Headers({"host": host}))


@pytest.mark.parametrize("settings", [{}, {"auth": "off", "host": "0.0.0.0"}], ids=["loopback", "public"])
async def test_a_foreign_page_cannot_have_work_done_through_a_visitors_browser(
    make_app: Callable[..., FastAPI], client_of: ClientOf, settings: dict[str, Any]
) -> None:
    """Only the admin API looked at the Origin, and a form may be sent anywhere: videos were queued so."""
    hosts = ["127.0.0.1", "pictures.example"]
    app = make_app(allowed_hosts=hosts, public_url="https://public.example/flashbulb", **settings)
    async with client_of(app) as client:
        for origin in ("https://evil.example", "null", "http://[::1]:9999", "https://public.example.evil"):
            headers = {"origin": origin}
            form = await client.post("/v1/videos", files={"prompt": (None, "dog")}, headers=headers)
            check_error(form, 403, "missing_scope")
            check_error(
                await client.post("/v1/jobs", json={"prompt": "dog"}, headers=headers), 403, "missing_scope"
            )
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        for origin in ("http://127.0.0.1:8000", "https://pictures.example", "https://public.example"):
            made = await client.post("/v1/jobs", json={"prompt": "dog"}, headers={"origin": origin})
            assert made.status_code == 200


async def test_a_page_that_has_a_key_may_stand_anywhere(
    app: FastAPI, client_of: ClientOf, keys: KeyStore
) -> None:
    made = await keys.create("a")
    async with client_of(app, made.secret) as client:
        answer = await client.post(
            "/v1/jobs", json={"prompt": "dog"}, headers={"origin": "https://a.example"}
        )
        assert answer.status_code == 200


async def test_public_without_keys_still_guards_admin_and_metrics(
    make_app: Callable[..., FastAPI], client_of: ClientOf, keys: KeyStore
) -> None:
    app = make_app(auth="off", host="0.0.0.0")
    admin = await keys.create("a", ["admin"])
    async with client_of(app) as client:
        assert (await client.get("/v1/models")).status_code == 200
        for path in ("/metrics", "/v1/admin/keys"):
            check_error(await client.get(path), 401, "invalid_api_key")
            headers = {"authorization": f"Bearer {admin.secret}"}
            assert (await client.get(path, headers=headers)).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", "127.0.0.1.example.org", ""])
def test_public_address_is_refused_without_a_key_or_the_override(host: str) -> None:
    for auth in ("auto", "keys", "off"):
        with pytest.raises(InvalidRequest, match="--allow-public"):
            settle_auth(auth, host, allow_public=False, has_keys=False)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="--allow-public"):
        settle_auth("off", host, allow_public=False, has_keys=True)
    for auth in ("auto", "keys"):
        assert settle_auth(auth, host, allow_public=False, has_keys=True) == "keys"  # type: ignore[arg-type]
        assert settle_auth(auth, host, allow_public=True, has_keys=True) == "keys"  # type: ignore[arg-type]
    assert settle_auth("auto", host, allow_public=True, has_keys=False) == "off"
    assert settle_auth("keys", host, allow_public=True, has_keys=False) == "keys"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_asks_for_keys_only_when_told(host: str) -> None:
    assert is_loopback(host)
    for has_keys in (True, False):
        assert settle_auth("auto", host, allow_public=False, has_keys=has_keys) == "off"
        assert settle_auth("keys", host, allow_public=False, has_keys=has_keys) == "keys"


def test_an_app_that_nobody_settled_asks_for_keys_in_public() -> None:
    assert Access.of("auto", "0.0.0.0") == Access(keys=True, public=True)
    assert Access.of("auto", "127.0.0.1") == Access(keys=False, public=False)


async def test_a_queue_out_of_reach_is_503_and_lets_nobody_in(keys: KeyStore, tmp_path: Path) -> None:
    made = await keys.create("a")
    async with Queue.connect(f"unix://{tmp_path}/nobody.sock") as unreachable:
        lost = KeyStore(unreachable)
        gate = Gate(lost, Access(keys=True, public=True))
        scope = {
            "type": "http", "method": "GET", "path": "/v1/models",
            "headers": [(b"authorization", f"Bearer {made.secret}".encode())],
        }  # fmt: skip
        with pytest.raises(QueueUnavailable):
            await gate(scope)
