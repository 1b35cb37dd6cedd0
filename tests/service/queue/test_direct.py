"""The connection that threads wait on themselves: one call at a time, a new one after a loss, errors in our words."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from redis.exceptions import ResponseError

from flashbulb_service.errors import QueueUnavailable
from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.queue import Queue
from flashbulb_service.queue import direct as direct_module
from flashbulb_service.queue.connection import open_client
from flashbulb_service.queue.direct import Direct

CALLS = 100


@pytest.fixture
def direct(redis_url):
    made = Direct(open_client(redis_url, 1))
    yield made
    made.close()


def test_threads_get_their_own_replies(direct):
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda number: direct.call("ECHO", f"{number}"), range(CALLS)))
    assert replies == [b"%d" % number for number in range(CALLS)]


def test_an_error_is_raised_and_the_next_call_works(direct):
    with pytest.raises(ResponseError, match="unknown command"):
        direct.call("NONSENSE")
    assert direct.call("PING") == b"PONG"


def test_a_long_reply_is_read_whole(direct, namespace):
    data = bytes(range(256)) * 2_000
    direct.call("SET", namespace, data)
    assert direct.call("GETDEL", namespace) == data


def test_a_call_on_a_lost_connection_fails_and_the_next_one_connects(direct, redis_url):
    own = direct.call("CLIENT", "ID")
    with redis.Redis.from_url(redis_url) as other:
        other.client_kill_filter(_id=own)
    with pytest.raises(QueueUnavailable):
        direct.call("PING")
    assert direct.call("CLIENT", "ID") != own


def test_a_server_that_is_not_there_is_said_to_be_unavailable(tmp_path: Path):
    with pytest.raises(QueueUnavailable, match="cannot be used"):
        Direct(open_client(f"unix://{tmp_path}/nobody", 1)).call("PING")


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direct_module, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        direct = Direct(open_client(f"redis://127.0.0.1:{silent.getsockname()[1]}", 1))
        with pytest.raises(QueueUnavailable):
            direct.call("PING")
        direct.close()


def test_closing_ends_a_call_that_waits(direct, namespace, redis_url):
    own = direct.call("CLIENT", "ID")
    failed = threading.Event()

    def wait() -> None:
        with pytest.raises(QueueUnavailable):
            direct.call("BLPOP", namespace, 5)
        failed.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    with redis.Redis.from_url(redis_url) as other:
        while "b" not in other.client_list(client_id=[str(own)])[0]["flags"]:
            pass
    direct.close()
    waiting.join(5)
    assert failed.is_set()


async def test_a_job_is_completed_from_a_thread_once(queue: Queue):
    [job_id] = (await queue.enqueue([NewJob("emoji@1", "64x64", b"p")])).ids
    [job] = await queue.claim("w", ["emoji@1"], 1, 5)
    await queue.complete("other", job, b"not mine")  # loads the script
    assert queue.complete_here("other", job, b"not mine") is False
    assert queue.complete_here("w", job, b"mine") is True
    assert queue.complete_here("w", job, b"mine") is True  # again, as after a lost answer
    view = await queue.get(job_id)
    assert view is not None
    assert (view.state, view.result) == (JobState.DONE, b"mine")
