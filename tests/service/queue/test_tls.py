"""The queue by TLS: jobs go their whole way, and a certificate that nobody vouches for is refused."""

import asyncio
import ssl
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.jobs import NewJob
from flashbulb_service.queue import Queue
from flashbulb_service.queue.connection import open_client
from flashbulb_service.queue.direct import Direct

TLS = Path(__file__).parent / "tls"  # a key for tests alone, and its own certificate for 127.0.0.1


@pytest.fixture
async def tls_url(redis_url):
    """The address of a server that ends TLS in front of the queue's, as a cloud's does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
    behind = urlsplit(redis_url)
    pumps: list[asyncio.Task[None]] = []

    async def pump(reader, writer):
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        finally:
            writer.transport.abort()

    async def serve(reader, writer):
        inner = await asyncio.open_unix_connection(unquote(behind.path))
        for one, other in ((reader, inner[1]), (inner[0], writer)):
            pumps.append(asyncio.create_task(pump(one, other)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    (password,) = parse_qs(behind.query)["password"]
    yield f"rediss://:{password}@127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    server.close()
    for task in pumps:
        task.cancel()
    await asyncio.gather(*pumps, return_exceptions=True)
    await server.wait_closed()


async def test_a_job_goes_its_whole_way_by_tls(tls_url):
    async with Queue.connect(f"{tls_url}?ssl_ca_certs={TLS / 'certificate.pem'}", namespace="tls") as queue:
        queued = await queue.enqueue(
            [NewJob(model="m@1", bucket="m@1:64x64:1", payload=b"asked", tenant="t")]
        )
        waiting = asyncio.create_task(queue.wait(queued.ids, 20.0, expected=queued.expected))
        assert await queue.wait_for_work(["m@1"], 5.0) is not None
        (job,) = await queue.claim("worker", ["m@1"], 1, 30.0)
        assert await queue.complete("worker", job, b"drawn", attached=b"picture")
        (view,) = await waiting
        assert (view.result, view.attached) == (b"drawn", b"picture")


async def test_a_thread_has_its_own_connection_by_tls(tls_url):
    client = open_client(f"{tls_url}?ssl_ca_certs={TLS / 'certificate.pem'}", 1)
    direct = Direct(client)
    try:
        assert await asyncio.to_thread(direct.call, "PING") == b"PONG"
    finally:
        direct.close()
        await client.aclose()


async def test_a_certificate_that_nobody_vouches_for_is_refused(tls_url):
    async with Queue.connect(tls_url, namespace="tls") as queue:
        with pytest.raises(QueueUnavailable, match="certificate"):
            await queue.get("none")
        with pytest.raises(QueueUnavailable, match="certificate"):
            await queue.enqueue([NewJob(model="m@1", bucket="m@1:64x64:1", payload=b"asked", tenant="t")])
