"""The queue's own connection: replies in order, a new one after a loss, and nothing taken that nobody hears."""

import asyncio
from urllib.parse import urlsplit

import pytest
import uvloop
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.queue import Queue
from flashbulb_service.queue.connection import _REFUSALS, open_client
from flashbulb_service.queue.line import Line

CALLS = 200


@pytest.fixture
async def line(redis_url):
    client = open_client(redis_url, 4)
    line = Line(client)
    yield line
    await line.aclose()
    await client.aclose()


@pytest.fixture
async def silent():
    """The address of a server that takes connections and says nothing."""
    held = []

    async def hold(reader, writer):
        held.append(writer)
        await reader.read()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    server.close()
    for writer in held:
        writer.close()
    await server.wait_closed()


async def is_blocked(client, number: int) -> bool:
    """Tell whether the connection of this number waits inside a command."""
    return "b" in (await client.client_list(client_id=[str(number)]))[0]["flags"]


async def test_calls_at_the_same_time_get_their_own_replies(line):
    replies = await asyncio.gather(*(line.call("ECHO", f"{number}") for number in range(CALLS)))
    assert replies == [b"%d" % number for number in range(CALLS)]


async def test_a_cancelled_call_leaves_its_reply_to_nobody_else(line):
    await line.call("PING")
    calls = [asyncio.create_task(line.call("ECHO", f"{number}")) for number in range(CALLS)]
    await asyncio.sleep(0)  # they are sent
    for call in calls[::2]:
        call.cancel()
    kept = await asyncio.gather(*calls[1::2])
    assert kept == [b"%d" % number for number in range(1, CALLS, 2)]


async def test_every_type_of_reply_is_read(line, namespace):
    assert await line.call("RPUSH", namespace, b"\r\n\0", "é", 7, 1.5) == 4
    assert await line.call("LRANGE", namespace, 0, -1) == [b"\r\n\0", "é".encode(), b"7", b"1.5"]
    assert await line.call("GET", f"{namespace}-none") is None
    assert await line.call("DEL", namespace) == 1


async def test_a_command_that_is_wrong_is_an_error_and_the_next_one_works(line):
    with pytest.raises(ResponseError, match="unknown command"):
        await line.call("NONSENSE")
    assert await line.call("PING") == b"PONG"


async def test_a_lost_connection_is_made_again(line, client):
    own = await line.call("CLIENT", "ID")
    await client.client_kill_filter(_id=own)
    assert await line.call("PING") == b"PONG"
    assert await line.call("CLIENT", "ID") != own


async def test_a_call_whose_connection_breaks_is_sent_again(line, client, namespace, wait_until):
    own = await line.call("CLIENT", "ID")
    waiting = asyncio.create_task(line.call("BLPOP", namespace, 5))
    await wait_until(lambda: is_blocked(client, own))
    await client.client_kill_filter(_id=own)
    await client.rpush(namespace, "late")
    assert await waiting == [namespace.encode(), b"late"]


async def test_a_server_that_is_not_there_is_said_to_be_unavailable():
    client = open_client("unix:///nowhere/at/all", 1)
    with pytest.raises(QueueUnavailable, match="cannot be used"):
        await Line(client).call("PING")
    await client.aclose()


async def test_a_server_that_says_nothing_is_given_up(silent):
    client = open_client(silent, 1)
    line = Line(client, timeout_s=0.05)
    with pytest.raises(QueueUnavailable, match=r"did not answer within 0\.05 s"):
        await line.call("PING")
    assert not line.is_busy
    await line.aclose()
    await client.aclose()


async def test_a_wrong_password_is_said(redis_url):
    parts = urlsplit(redis_url)
    client = open_client(f"unix://{parts.path}?password=wrong", 1)
    with pytest.raises(QueueUnavailable, match="password"):
        await Line(client).call("PING")
    await client.aclose()


async def test_the_database_of_the_address_is_used(redis_url, client, namespace):
    own = open_client(f"{redis_url}&db=3", 1)
    line = Line(own)
    await line.call("SET", namespace, "here")
    assert await client.get(namespace) is None
    assert await line.call("GETDEL", namespace) == b"here"
    await line.aclose()
    await own.aclose()


async def test_a_wait_that_is_cancelled_takes_nothing_from_the_server(
    redis_url, client, namespace, wait_until
):
    own = open_client(redis_url, 1)
    line = Line(own, timeout_s=None)
    number = await line.call("CLIENT", "ID")
    waiting = asyncio.create_task(line.call("BLPOP", namespace, 0))
    await wait_until(lambda: is_blocked(client, number))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    async def is_gone() -> bool:
        return not await client.client_list(client_id=[str(number)])

    await wait_until(is_gone)
    await client.rpush(namespace, "for another one")
    assert await client.lpop(namespace) == b"for another one"
    await line.aclose()
    await own.aclose()


def test_it_works_on_the_loop_that_serves(redis_url):
    async def ask() -> list[bytes]:
        client = open_client(redis_url, 1)
        line = Line(client)
        try:
            return await asyncio.gather(*(line.call("ECHO", f"{number}") for number in range(CALLS)))
        finally:
            await line.aclose()
            await client.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(ask()) == [b"%d" % number for number in range(CALLS)]


@pytest.mark.parametrize(
    "wait", [lambda queue: queue.wait_for_work(["emoji@1"], 10), lambda queue: queue.wait_for_hooks(10)]
)
async def test_a_failover_that_ends_a_wait_is_an_outage(queue: Queue, client: Redis, wait_until, wait):
    """A primary that became a replica answered -UNBLOCKED, which ended workers and webhooks like a bug."""
    waiting = asyncio.create_task(wait(queue))

    async def blocked() -> list[str]:
        return [one["id"] for one in await client.client_list() if "b" in one["flags"]]

    await wait_until(blocked)
    (number,) = await blocked()
    await client.client_unblock(int(number), error=True)
    with pytest.raises(QueueUnavailable, match="UNBLOCKED"):
        await waiting


@pytest.mark.parametrize("code", [*_REFUSALS, "LOADING it's", "MISCONF it's"])
async def test_a_server_that_does_not_serve_now_is_unavailable(queue: Queue, line: Line, code):
    """The client takes some codes off their text, and a pipeline puts its own words before them: 500 instead of 503."""
    refuse = ("EVAL", "return redis.error_reply(ARGV[1])", 0, f"{code} come later")
    with pytest.raises(QueueUnavailable, match="come later"):
        await line.call(*refuse)
    with pytest.raises(QueueUnavailable, match="come later"):
        async with queue.commands() as client:
            await client.execute_command(*refuse)
    with pytest.raises(QueueUnavailable, match="come later"):
        async with queue.commands() as client, client.pipeline(transaction=False) as pipe:
            await pipe.execute_command(*refuse).execute()


async def test_an_answer_that_a_command_is_wrong_is_no_outage_in_a_pipeline_either(queue: Queue):
    with pytest.raises(ResponseError, match="BUSY"):
        async with queue.commands() as client, client.pipeline(transaction=False) as pipe:
            await pipe.execute_command("NONSENSE", "BUSY").execute()


async def test_scripts_that_a_server_has_forgotten_are_sent_again(queue: Queue, client: Redis):
    before = await queue.stats()
    await client.script_flush()
    assert await queue.stats() == before
