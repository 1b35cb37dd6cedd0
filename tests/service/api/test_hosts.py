"""Only requests that are meant for this server are served, and answers never name another."""

from collections.abc import Callable

import httpx2
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from flashbulb_service.api.hosts import accepts
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
        assert accepts([host], bound_to=bound_to, allowed=())
    for host in FOREIGN + MALFORMED:
        assert not accepts([host], bound_to=bound_to, allowed=())
    assert accepts(["Pictures.example:443"], bound_to=bound_to, allowed={"pictures.example"})
    assert not accepts(["localhost", "evil.example"], bound_to=bound_to, allowed=())


def test_elsewhere_the_setting_decides_and_empty_means_any() -> None:
    for host in OWN + FOREIGN:
        assert accepts([host], bound_to="0.0.0.0", allowed=())
        assert not accepts([host], bound_to="0.0.0.0", allowed={"pictures.example"})
    for host in MALFORMED:
        assert not accepts([host], bound_to="0.0.0.0", allowed=())


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
