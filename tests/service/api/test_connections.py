"""Slow and endless heads: the connection ends, in bounded time and memory, and others are served meanwhile."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
from fastapi import FastAPI

from flashbulb_service.connections import MAX_HEAD_BYTES
from flashbulb_service.serve import _http_server
from flashbulb_service.settings import Settings

MakeApp = Callable[..., FastAPI]
Address = tuple[str, int]


@pytest_asyncio.fixture
async def address(make_app: MakeApp, models_dir: Path) -> AsyncIterator[Address]:
    settings = Settings(models=models_dir, head_timeout_s=0.3, body_timeout_s=0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = _http_server(settings, make_app(body_timeout_s=0.3))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        yield listener.getsockname()
        server.should_exit = True
        await serving


async def talk(address: Address, first: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(first)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("head", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nx: y"])
async def test_a_head_that_never_ends_is_408(address: Address, head: bytes) -> None:
    stalled = asyncio.create_task(talk(address, head))
    async with httpx2.AsyncClient() as client:
        assert (await client.get(f"http://{address[0]}:{address[1]}/livez")).status_code == 200
    answer = await stalled
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"code": "request_timeout"' in answer


async def test_a_head_without_bounds_is_431(address: Address) -> None:
    answer = await talk(address, b"GET /livez HTTP/1.1\r\n" + b"x: y\r\n" * (MAX_HEAD_BYTES // 5))
    assert answer.startswith(b"HTTP/1.1 431 ")


async def test_a_body_that_stalls_is_408_on_the_wire(address: Address) -> None:
    head = b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    answer = await talk(address, head)
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"request_timeout"' in answer


async def test_a_connection_that_is_kept_serves_again_and_again(address: Address) -> None:
    async with httpx2.AsyncClient() as client:
        for pause_s in (0, 0.5, 0):  # longer than a head may take
            await asyncio.sleep(pause_s)
            assert (await client.get(f"http://{address[0]}:{address[1]}/livez")).status_code == 200
