"""`flashbulb serve` as processes: start, restart, crash, refusal."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx2
import pytest

from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.queue import Queue
from flashbulb_service.tasks import ImageTask
from support.serving import Serving, run_flashbulb
from support.tiny_bundle import make_tiny_bundle

WaitUntil = Callable[..., Awaitable[None]]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, waiting to be collected by whoever adopted it


def is_worker(pid: int) -> bool:
    return b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def queue_of(data: Path) -> Queue:
    return Queue.connect(json.loads((data / "queue" / "server.json").read_text())["url"])


def jobs(count: int) -> list[NewJob]:
    tasks = [ImageTask(prompt="dog", seed=seed, index=0, width=64, height=64) for seed in range(count)]
    return [NewJob(model="tiny@1", bucket="tiny@1:64x64:1", payload=task.to_bytes()) for task in tasks]


async def test_killing_serve_leaves_nobody_behind_and_loses_nothing(
    models_dir: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    data = tmp_path / "data"
    with Serving(models_dir, data) as serving:
        children = serving.children()
        assert len(children) == 2 and all(map(is_running, children))
        answer = httpx2.post(
            f"{serving.url}/v1/images/generations",
            json={"prompt": "dog", "seed": 1, "response_format": "url"},
        )
        name = answer.json()["data"][0]["url"].rpartition("/")[2]
        async with queue_of(data) as queue:
            ids = (await queue.enqueue(jobs(200))).ids
        serving.end(signal.SIGKILL)

    async def all_gone() -> bool:
        return not any(map(is_running, children))

    await wait_until(all_gone)
    with Serving(models_dir, data) as serving:
        async with queue_of(data) as queue:
            views = await queue.wait(ids, 30)
        assert [view.state for view in views] == [JobState.DONE] * 200
        kept = httpx2.get(f"{serving.url}/v1/images/results/{name}")
        assert kept.status_code == 200 and kept.content.startswith(b"\x89PNG")


async def test_sigterm_ends_everything_in_order(
    models_dir: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    with Serving(models_dir, tmp_path / "data", "--workers", "2") as serving:
        children = serving.children()
        assert len(children) == 3
        assert serving.end(signal.SIGTERM) == 0

    async def all_gone() -> bool:
        return not any(map(is_running, children))

    await wait_until(all_gone)


async def test_a_killed_worker_is_replaced(models_dir: Path, tmp_path: Path, wait_until: WaitUntil) -> None:
    with Serving(models_dir, tmp_path / "data", lease_s="1") as serving:
        old = next(pid for pid in serving.children() if is_worker(pid))
        os.kill(old, signal.SIGKILL)
        body = {"prompt": "dog", "n": 3}
        answer = httpx2.post(f"{serving.url}/v1/images/generations", json=body, timeout=20)
        assert answer.status_code == 200
        assert not is_running(old)


@pytest.mark.timeout(180)
async def test_the_one_worker_of_serve_has_a_socket_for_head_starts_and_so_has_the_one_that_replaces_it(
    models_dir: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    with Serving(models_dir, tmp_path / "data") as serving:
        (first,) = filter(None, map(head_start_socket, serving.children()))
        (worker,) = (pid for pid in serving.children() if head_start_socket(pid))
        os.kill(worker, signal.SIGKILL)

        async def is_replaced() -> bool:
            found = {pid: head_start_socket(pid) for pid in serving.children() if pid != worker}
            return first in found.values()

        await wait_until(is_replaced)
        assert first.startswith("socket:")
        answer = httpx2.post(f"{serving.url}/v1/images/generations", json={"prompt": "dog"}, timeout=60)
        assert answer.status_code == 200
        assert "flashbulb_early_answers_total" in httpx2.get(f"{serving.url}/metrics").text


def test_of_several_workers_none_gets_head_starts(models_dir: Path, tmp_path: Path) -> None:
    """Another one may get the job."""
    with Serving(models_dir, tmp_path / "data", "--workers", "2") as serving:
        for pid in filter(is_worker, serving.children()):
            assert b"--head-start-fd" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def head_start_socket(pid: int) -> str:
    """Which socket a process has under the number that its command line names; "" if it names none or has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "--head-start-fd" not in words:  # Valkey, or a worker that is not quite one yet
            return ""
        return str(Path(f"/proc/{pid}/fd/{words[words.index('--head-start-fd') + 1]}").readlink())
    except OSError:
        return ""


def test_a_second_start_is_ready_within_three_seconds(models_dir: Path, tmp_path: Path) -> None:
    """Three seconds, or on a slow or busy machine three times what one process takes there for the imports alone."""
    with Serving(models_dir, tmp_path / "data"):
        pass
    times, limits = [], []
    for _ in range(6):  # other tests run beside this one: one start that was let alone is enough
        imports = "import fastapi, numpy, onnxruntime, PIL.Image, redis.asyncio, tokenizers"
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", imports], check=True)
        limits.append(max(3.0, 3 * (time.monotonic() - begin)))
        begin = time.monotonic()
        with Serving(models_dir, tmp_path / "data"):
            times.append(time.monotonic() - begin)
        if times[-1] <= limits[-1]:
            return
    raise AssertionError(f"ready after {times} s, expected at most {limits}")


def last_line(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def test_a_damaged_bundle_is_not_served(models_dir: Path, tmp_path: Path) -> None:
    file = models_dir / "tiny" / "1" / "decoder.onnx"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    done = run_flashbulb("serve", "--models", models_dir, "--data", tmp_path / "data", "--port", "0")
    assert done.returncode == 1
    assert "decoder.onnx" in last_line(done.stderr)
    assert "Traceback" not in done.stderr


def test_a_data_folder_in_use_is_told_in_one_line(models_dir: Path, tmp_path: Path) -> None:
    """A second server joined the first one's Valkey, and answered 503 for ever when the first had ended."""
    data = tmp_path / "data"
    with Serving(models_dir, data) as serving:
        done = run_flashbulb("serve", "--models", models_dir, "--data", data, "--port", "0")
        assert done.returncode == 1
        assert last_line(done.stderr) == (
            f"flashbulb: {data} is in use by another flashbulb serve (pid {serving.process.pid}): "
            "stop it, or pass --data"
        )
        assert httpx2.get(f"{serving.url}/readyz").status_code == 200


def test_a_taken_port_is_told_in_one_line(models_dir: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_flashbulb("serve", "--models", models_dir, "--data", tmp_path / "d", "--port", str(port))
    assert done.returncode == 1
    assert last_line(done.stderr).startswith(f"flashbulb: cannot listen on 127.0.0.1:{port}")
    assert not (tmp_path / "d").exists()


async def test_a_new_version_is_served_without_a_restart(
    models_dir: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    with Serving(models_dir, tmp_path / "data") as serving:
        make_tiny_bundle(tmp_path / "elsewhere", version=2)
        (tmp_path / "elsewhere" / "tiny" / "2").rename(models_dir / "tiny" / "2")
        async with httpx2.AsyncClient(base_url=serving.url) as client:

            async def offered() -> bool:
                return bool((await client.get("/v1/models")).json()["data"][0]["version"] == 2)

            await wait_until(offered, 30)
            answer = await client.post("/v1/images/generations", json={"prompt": "dog", "model": "tiny@2"})
            assert answer.status_code == 200
