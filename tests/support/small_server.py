"""Small servers in the shape of the images API, written per test, and load on them."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from PIL import Image

from flashbulb_service.bench.client import connect
from flashbulb_service.bench.openloop import Run, run_plan
from flashbulb_service.bench.validity import Judge, draw_of, read_pictures
from flashbulb_service.bench.workload import Picture, Planned, Target, Tenant

PICTURE = Picture("red apple", 1)
ANYBODY = Tenant("default")


def png(level: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(out, "PNG")
    return out.getvalue()


def answer(level: int) -> bytes:
    return json.dumps({"data": [{"b64_json": base64.b64encode(png(level)).decode()}]}).encode()


@asynccontextmanager
async def serving(handle: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/images/generations", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    await runner.cleanup()


async def load(url: str, offsets: list[float], *, timeout_s: float = 10, max_in_flight: int = 1000) -> Run:
    judge = Judge("reference", {PICTURE: draw_of(read_pictures(answer(7)))})
    planned = [Planned(offset, PICTURE, ANYBODY) for offset in offsets]
    async with connect(Target(url), timeout_s=timeout_s) as client:
        return await run_plan(client, planned, stop=asyncio.Event(), judge=judge, max_in_flight=max_in_flight)
