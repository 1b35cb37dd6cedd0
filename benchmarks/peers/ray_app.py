"""Ray Serve around the student: batches of at most --batch, a wait of --wait-ms, one replica."""

import asyncio
import signal
import threading
from pathlib import Path
from typing import Any

import ray
from ray import serve
from shape import draw_answers, options
from starlette.requests import Request
from student import open_as_worker


def build(bundle: Path, threads: int, batch: int, wait_ms: float) -> serve.Application:
    """Make the application."""

    # More requests at a replica than fit into a batch, or no batch would ever be full.
    @serve.deployment(num_replicas=1, max_ongoing_requests=2000, ray_actor_options={"num_cpus": 1})
    class Pictures:
        def __init__(self) -> None:
            self.student = open_as_worker(bundle, threads=threads, batch=batch)

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=wait_ms / 1000)
        async def draw(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return await asyncio.to_thread(draw_answers, self.student, bodies)

        async def __call__(self, request: Request) -> dict[str, Any]:
            return await self.draw(await request.json())

    return Pictures.bind()


if __name__ == "__main__":
    args = options()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(
        build(args.bundle.resolve(), args.threads, args.batch, args.wait_ms),
        route_prefix="/v1/images/generations",
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()
