"""Only requests that are meant for this server are served, and answers never name another."""

from collections.abc import Callable

import httpx2
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from flashbulb_service.api.hosts import PROBES, accepts
from flashbulb_service.api.images import address_of

OWN = ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.9.9.9", "[::1]", "[::1]:8000"]
FOREIGN = [
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.evil.example:8000",
    "10.0.0.1",
    "[2001:db8::1]",
]
MALFORMED = ["", "a b", "evil.example/x", "localhost:80:80", "me@localhost", "localhost\n"]


@pytest.mark.parametrize("bound_to", ["127.0.0.1", "::1", "localhost"])
def test_loopback_serves_its_own_names_and_those_allowed(bound_to: str) -> None:
    for host in OWN:
        assert accepts([host], path="/", bound_to=bound_to, allowed=())
    for host in FOREIGN + MALFORMED:
        assert not accepts([host], path="/", bound_to=bound_to, allowed=())
    assert accepts(["Pictures.example:443"], path="/", bound_to=bound_to, allowed={"pictures.example"})
    assert not accepts(["localhost", "evil.example"], path="/", bound_to=bound_to, allowed=())


def test_elsewhere_the_setting_decides_and_empty_means_any() -> None:
    for host in OWN + FOREIGN:
        assert accepts([host], path="/", bound_to="0.0.0.0", allowed=())
        assert not accepts([host], path="/", bound_to="0.0.0.0", allowed={"pictures.example"})
    for host in MALFORMED:
        assert not accepts([host], path="/", bound_to="0.0.0.0", allowed=())


@pytest.mark.parametrize("path", sorted(PROBES))
def test_probes_come_by_any_name_but_on_loopback(path: str) -> None:
    for host in OWN + FOREIGN:
        assert accepts([host], path=path, bound_to="0.0.0.0", allowed={"pictures.example"})
    for host in FOREIGN:
        assert not accepts([host], path=path, bound_to="127.0.0.1", allowed={"pictures.example"})
    for host in MALFORMED:
        assert not accepts([host], path=path, bound_to="0.0.0.0", allowed={"pictures.example"})


async def test_probes_of_a_container_do_not_need_its_address_among_the_allowed_hosts(
    make_app: Callable[..., FastAPI],
) -> None:
    """With FLASHBULB_ALLOWED_HOSTS set, kubelet, Docker and Prometheus got 421, and pods were ended as dead."""
    app = make_app(host="0.0.0.0", allowed_hosts=["pictures.example"])
    transport = httpx2.ASGITransport(app=app)
    found = {}
    async with httpx2.AsyncClient(transport=transport, base_url="http://10.0.0.7:8000") as client:
        for path in ("/livez", "/readyz", "/metrics", "/v1/models", "/"):
            found[path] = (await client.get(path)).status_code
    # No worker is there, nobody sent a key; what is no probe is not even looked at.
    assert found == {"/livez": 200, "/readyz": 503, "/metrics": 401, "/v1/models": 421, "/": 421}


def test_a_foreign_host_gets_421_from_a_real_server(http: httpx2.Client) -> None:
    body = {"prompt": "dog", "response_format": "url"}
    answer = http.post("/v1/images/generations", json=body, headers={"host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "wrong_host")
    assert answer.headers["x-request-id"].startswith("req_")
    url = http.post("/v1/images/generations", json=body).json()["data"][0]["url"]
    assert url.startswith(str(http.base_url).rstrip("/") + "/v1/images/results/")


async def test_addresses_begin_with_the_public_url_where_there_is_one(
    make_app: Callable[..., FastAPI],
) -> None:
    app = make_app(public_url="https://pictures.example/flashbulb/")
    scope = {"type": "http", "app": app, "headers": [(b"host", b"test")], "path": "/", "scheme": "http"}
    address = address_of(app.state.context, Request(scope))
    assert address("a.png") == "https://pictures.example/flashbulb/v1/images/results/a.png"
