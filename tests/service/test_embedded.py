"""The embedded server: one per folder, gone with its parent, and nothing acknowledged is lost."""

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis

from flashbulb_service import embedded
from flashbulb_service.embedded import EmbeddedServer, find_server
from flashbulb_service.errors import QueueUnavailable, ServerStartError
from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.queue import Limits, Queue

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="the parent-death signal exists on Linux only; see embedded.py"
)

PARENT = """
import sys
from pathlib import Path
import redis
from flashbulb_service.embedded import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]), binary=Path(sys.argv[2]))
url = server.start()
redis.Redis.from_url(url).set("kept", "yes")
print(server.pid, flush=True)
sys.stdin.read()
"""


def new() -> NewJob:
    return NewJob(model="emoji@1", bucket="64x64", payload=b"p")


def is_running(pid: int) -> bool:
    """Tell whether a process runs; a zombie that nobody has collected does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return not Path("/proc/self").exists()
    return state not in "ZX"


def connect(url: str) -> "redis.Redis":
    return redis.Redis.from_url(url, decode_responses=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def server(folder: Path, server_binary: Path | None):
    with EmbeddedServer(folder, binary=server_binary) as running:
        yield running


def test_server_answers_on_its_socket_and_its_port(server):
    for url in (server.url, server.tcp_url):
        with connect(url) as client:
            assert client.ping()


def test_server_is_durable_by_default(server):
    with connect(server.url) as client:
        wanted = {"appendonly": "yes", "appendfsync": "no", "maxmemory-policy": "noeviction"}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted


def test_what_was_written_is_put_on_the_disk_where_it_has_grown(server, folder, monkeypatch):
    opened: list[str] = []
    own_fsync = os.fsync

    def watched(number: int) -> None:
        opened.append(str(Path(f"/proc/self/fd/{number}").readlink()))
        own_fsync(number)

    monkeypatch.setattr(embedded.os, "fsync", watched)
    files = folder / embedded.APPEND_ONLY_FOLDER
    first = embedded.sync_files(files, {})
    assert set(opened) == {str(path) for path in files.iterdir()}
    del opened[:]
    with connect(server.url) as client:
        client.set("more", "x" * 100)
    second = embedded.sync_files(files, first)
    [grown] = opened
    assert grown.endswith(".incr.aof")
    assert second[files / grown] > first[files / grown]
    del opened[:]
    assert embedded.sync_files(files, second) == second
    assert opened == []


def test_what_was_acknowledged_is_written_while_an_fsync_is_busy(server, folder):
    """At `everysec` a server puts its writes off for as long as the disk is busy, and answers all the same."""
    with connect(server.url) as client:
        assert client.config_get("appendfsync")["appendfsync"] == "no"
        for number in range(200):
            client.set(f"key-{number}", "x")
            files = (folder / embedded.APPEND_ONLY_FOLDER).glob("*.incr.aof")
            assert any(b"key-%d" % number in path.read_bytes() for path in files)


def test_server_admits_nobody_without_its_password(server):
    without = "redis://" + server.tcp_url.split("@", 1)[1]
    with connect(without) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_password_is_kept_from_other_users(server, folder):
    password = server.url.rsplit("=", 1)[1]
    processes = subprocess.run(
        ["ps", "-ww", "-p", str(server.pid), "-o", "args"], capture_output=True, text=True
    )
    assert "valkey" in processes.stdout or "redis" in processes.stdout
    assert password not in processes.stdout
    assert (folder / "server.json").stat().st_mode & 0o077 == 0
    assert password not in (folder / "server.log").read_text()


def test_second_start_in_the_same_folder_joins_the_first(server, folder):
    with EmbeddedServer(folder) as second:
        assert (server.owned, second.owned) == (True, False)
        assert second.url == server.url
        assert second.pid is None
        assert second.owner_pid == os.getpid()
    with connect(server.url) as client:  # the end of the guest is not the end of the server
        assert client.ping()


def test_a_server_that_outlived_its_owner_is_replaced(folder, server_binary):
    """As on macOS, where the kernel sends no signal: joining it would leave it without a supervisor."""
    binary = find_server(server_binary)
    orphaning = 'from flashbulb_service import embedded\nembedded._TRAMPOLINE = "import os, sys;'
    orphaning += ' os.execv(sys.argv[2], sys.argv[2:])"\n'
    command = [sys.executable, "-c", orphaning + PARENT, str(folder), str(binary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        orphan = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    assert is_running(orphan)
    with EmbeddedServer(folder, binary=server_binary) as server, connect(server.url) as client:
        assert server.owned
        assert not is_running(orphan)
        assert client.get("kept") == "yes"


def test_simultaneous_starts_make_one_server(folder, server_binary):
    servers = [EmbeddedServer(folder, binary=server_binary) for _ in range(4)]
    threads = [threading.Thread(target=server.start) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert sum(server.owned for server in servers) == 1
        assert len({server.url for server in servers}) == 1
        with connect(servers[0].url) as client:  # also after the thread that started it has ended
            assert client.ping()
    finally:
        for server in servers:
            server.stop()


def test_data_survives_stop_and_start(folder, server_binary):
    with EmbeddedServer(folder, binary=server_binary) as first, connect(first.url) as client:
        client.set("kept", "yes")
        pid = first.pid
    assert not is_running(pid)
    with EmbeddedServer(folder, binary=server_binary) as second, connect(second.url) as client:
        assert client.get("kept") == "yes"


def test_stop_leaves_the_folder_free_and_can_be_repeated(folder, server_binary):
    server = EmbeddedServer(folder, binary=server_binary)
    server.start()
    server.stop()
    server.stop()
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not (folder / "server.json").exists()
    assert not (folder / "server.sock").exists()


def test_folder_with_a_name_too_long_for_a_socket_works(tmp_path, server_binary):
    folder = tmp_path / ("long name with 'quotes\" " * 6).strip()
    with EmbeddedServer(folder, binary=server_binary) as server, connect(server.url) as client:
        assert client.ping()
        assert client.config_get("dir")["dir"] == str(folder)


def test_missing_binary_is_one_clear_line(folder):
    with pytest.raises(ServerStartError) as refused:
        EmbeddedServer(folder, binary=Path("/nowhere/valkey-server")).start()
    assert "\n" not in str(refused.value)
    assert "/nowhere/valkey-server" in str(refused.value)


def test_program_that_is_no_server_is_refused(folder):
    with pytest.raises(ServerStartError, match="no Valkey or Redis server"):
        EmbeddedServer(folder, binary=Path(sys.executable)).start()


def test_server_that_is_too_old_is_refused(tmp_path):
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=00000000:0 malloc=libc bits=64 build=0'\n")
    old.chmod(0o755)
    with pytest.raises(ServerStartError, match=r"older than Redis 7\.0"):
        find_server(old)


def test_old_or_broken_servers_on_path_are_passed_over(tmp_path, monkeypatch):
    for name, body in (("valkey-server", "exit 1"), ("redis-server", "echo 'Redis server v=6.2.14'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(embedded.shutil, "which", lambda name: str(tmp_path / name))
    assert find_server().parent != tmp_path


def test_damaged_data_is_one_clear_line(folder, server_binary):
    with EmbeddedServer(folder, binary=server_binary) as server, connect(server.url) as client:
        client.set("a", "b" * 1000)
    [log] = (folder / "appendonlydir").glob("*.incr.aof")
    log.write_bytes(b"garbage" + log.read_bytes())
    with pytest.raises(ServerStartError) as refused:
        EmbeddedServer(folder, binary=server_binary).start()
    assert "\n" not in str(refused.value)
    assert "Bad file format" in str(refused.value)


async def test_killed_server_returns_and_nothing_acknowledged_is_lost(server, wait_until):
    acknowledged: list[str] = []

    async def enqueue_for_ever(queue: Queue) -> None:
        while True:
            try:
                acknowledged.extend((await queue.enqueue([new()] * 2)).ids)
            except QueueUnavailable:
                await asyncio.sleep(0.005)  # not acknowledged: nothing was promised

    limits = Limits(max_queued=1_000_000, max_queued_per_tenant=1_000_000)
    async with Queue.connect(server.url, limits=limits) as queue:
        waiting = asyncio.create_task(queue.wait((await queue.enqueue([new()])).ids, 30))
        [first] = await queue.claim("w", ["emoji@1"], 1, 60)
        producers = [asyncio.create_task(enqueue_for_ever(queue)) for _ in range(8)]

        async def has_grown(by: int, since: int) -> bool:
            return len(acknowledged) >= since + by

        await wait_until(lambda: has_grown(200, 0))
        killed = server.pid
        os.kill(killed, signal.SIGKILL)

        async def is_back() -> bool:
            return server.pid not in (None, killed)

        await wait_until(is_back)
        before = len(acknowledged)
        await wait_until(lambda: has_grown(200, before), timeout_s=30.0)
        for producer in producers:
            producer.cancel()
        await asyncio.wait(producers)

        views = await queue._views(acknowledged)
        lost = [job_id for job_id, view in zip(acknowledged, views, strict=True) if view is None]
        assert lost == []
        assert all(view.state is JobState.QUEUED for view in views)
        # whoever waited before the crash hears of what happens after it
        assert await queue.complete("w", first, b"ok")
        assert [view.result for view in await waiting] == [b"ok"]


async def test_a_server_that_cannot_be_started_again_at_once_is_started_later(
    server, monkeypatch, wait_until, caplog
):
    """For want of memory at that moment, the queue was gone until `serve` was started again."""
    errors, popen = [OSError(errno.ENOMEM, "Cannot allocate memory")], subprocess.Popen

    def start(*args, **kwargs):
        if errors:
            raise errors.pop()
        return popen(*args, **kwargs)

    async def answers() -> bool:
        return not errors and embedded._answers(server.url)

    monkeypatch.setattr(embedded.subprocess, "Popen", start)
    os.kill(server.pid, signal.SIGKILL)
    await wait_until(answers)
    assert "cannot be started: [Errno 12] Cannot allocate memory" in caplog.text


@linux_only
def test_kill_9_of_the_parent_leaves_no_server_and_loses_nothing(folder, server_binary):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), str(find_server(server_binary))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    # The lock is inherited by the server: to own the folder is to know that the old one is gone.
    with EmbeddedServer(folder, binary=server_binary) as server:
        assert server.owned
        assert not is_running(pid)
        with connect(server.url) as client:
            assert client.get("kept") == "yes"


@linux_only
def test_server_outlives_the_thread_that_asked_for_it(folder, server_binary):
    """The parent-death signal fires when a *thread* ends; ours must be one that stays."""
    server = EmbeddedServer(folder, binary=server_binary)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        pid = server.pid
        with connect(server.url) as client:
            for _ in range(20):
                assert client.ping()
        assert server.pid == pid
        assert is_running(pid)
    finally:
        server.stop()


def test_unreachable_server_is_an_error_of_ours(tmp_path):
    async def ask() -> None:
        async with Queue.connect(f"unix://{tmp_path}/nothing.sock") as queue:
            with pytest.raises(QueueUnavailable, match="cannot be used"):
                await queue.stats()

    asyncio.run(ask())
