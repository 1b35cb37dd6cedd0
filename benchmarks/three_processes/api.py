"""The least API in front of a queue: a request becomes a job, its end becomes the answer. For `benchmarks/floor.py`."""

import asyncio
import base64
import json
import sys
import uuid
from typing import Any

import redis.asyncio as redis
import uvicorn

STORE = """
redis.call('HSET', KEYS[1], 'state', 'queued', 'payload', ARGV[1])
redis.call('RPUSH', 'waiting', KEYS[1] .. ' ' .. ARGV[1])
"""


class Api:
    """An ASGI application without routes: whatever is posted is asked for."""

    def __init__(self, url: str) -> None:
        """Ask the queue at this address."""
        self._client = redis.Redis.from_url(url, socket_timeout=None)
        self._store = self._client.register_script(STORE)
        self._ends: dict[str, asyncio.Future[bytes]] = {}
        self._listening: asyncio.Task[None] | None = None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request, or start and stop with the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        job = uuid.uuid4().hex
        self._ends[job] = end = asyncio.get_running_loop().create_future()
        await self._store(keys=[job], args=[body])
        answer = json.dumps(
            {"created": 0, "data": [{"b64_json": base64.b64encode(await end).decode()}]}
        ).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        ends = self._client.pubsub()
        await ends.subscribe("ends")
        self._listening = asyncio.create_task(self._listen(ends))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._listening.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _listen(self, ends: Any) -> None:
        async for message in ends.listen():
            if message["type"] == "message":
                job, _, picture = message["data"].partition(b" ")
                self._ends.pop(job.decode()).set_result(picture)


if __name__ == "__main__":
    queue, port = sys.argv[1:]
    uvicorn.run(Api(queue), host="127.0.0.1", port=int(port), log_level="warning", access_log=False)
