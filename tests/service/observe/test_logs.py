"""Logs: a request is found in every process by its id, and nobody's prompt is."""

import json
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.outages import OutageLog
from flashbulb_service.pipeline import hide_prompt
from flashbulb_service.queue import Queue
from flashbulb_service.tasks import ImageTask
from support.serving import FLASHBULB, Serving, clean_env
from support.tiny_bundle import make_tiny_bundle

SECRET = "zebra-with-a-secret"


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_bundle(folder)
    return folder


def test_an_outage_is_told_at_its_begin_now_and_then_and_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    outage = OutageLog(logging.getLogger("test"), "no queue", repeat_s=30, clock=lambda: now)
    with caplog.at_level(logging.INFO):
        outage.worked()
        for second in range(61):
            now = float(second)
            outage.failed(OSError("gone"))
        now = 61.0
        outage.worked()
        outage.worked()
        outage.failed(OSError("again"))
    assert caplog.messages == [
        "no queue: gone",
        "no queue: gone (29 more like this)",
        "no queue: gone (29 more like this)",
        "no queue no longer: it lasted 61.0 s",
        "no queue: again",
    ]


def test_a_prompt_is_cut_out_of_a_message_that_quotes_it() -> None:
    assert (
        hide_prompt("ValueError: cannot draw 'red apple'", "red apple")
        == "ValueError: cannot draw '[prompt]'"
    )
    assert hide_prompt("KeyError: 'a\\tb dog'", "a\tb dog") == "KeyError: '[prompt]'"
    assert hide_prompt("a plain message", "a") == "a plain message"


def lines_of(log: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def test_one_request_is_found_in_api_and_worker_by_its_id_and_its_prompt_nowhere(
    models_dir: Path, tmp_path: Path
) -> None:
    with Serving(models_dir, tmp_path / "data", log_format="json") as serving:
        url = f"{serving.url}/v1/images/generations"
        good = httpx2.post(url, json={"prompt": SECRET, "response_format": "url"}, timeout=20)
        picture = good.json()["data"][0]["url"]
        assert httpx2.get(picture).status_code == 200
        httpx2.post(url, json={"prompt": [SECRET], "n": SECRET}, timeout=20)
    log = (tmp_path / "data.log").read_text()
    found = [line for line in lines_of(log) if line.get("request_id") == good.headers["x-request-id"]]
    assert {line["logger"] for line in found} == {
        "flashbulb_service.api.middleware",
        "flashbulb_service.pipeline",
    }
    (done,) = [line for line in found if line["logger"] == "flashbulb_service.pipeline"]
    assert done["job_id"] in done["event"] and done["tenant"] == "default"
    assert SECRET not in log
    assert picture.rpartition("/")[2] not in log  # who knows the address may see the picture


def start_worker(env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen([*FLASHBULB, "worker"], env=env, stderr=subprocess.PIPE, text=True)


async def test_a_damaged_task_is_logged_without_its_content(
    queue: Queue, redis_url: str, namespace: str, models_dir: Path, tmp_path: Path
) -> None:
    """The validation error used to quote its input: the prompt stood in the log and in the job's message."""
    task = ImageTask(prompt=SECRET, seed=1, index=0, width=64, height=64)
    damaged = task.to_bytes().replace(b'"index":0', f'"index":"{SECRET}"'.encode())
    job = NewJob(model="tiny@1", bucket="tiny@1:64x64:1", payload=damaged, tenant="ann")
    (job_id,) = (await queue.enqueue([job])).ids
    env = clean_env(
        redis=redis_url,
        namespace=namespace,
        models=str(models_dir),
        data=str(tmp_path),
        threads="1",
        log_format="json",
    )
    worker = start_worker(env)
    try:
        (view,) = await queue.wait([job_id], 30)
    finally:
        worker.terminate()
        _, log = worker.communicate(timeout=20)
    assert view.state is JobState.FAILED and view.error is not None
    (line,) = [line for line in lines_of(log) if line.get("job_id") == job_id]
    assert line["tenant"] == "ann" and "index" in line["event"]
    assert SECRET not in log + view.error.message


def test_a_request_s_id_travels_with_its_task_and_can_forge_no_line(
    make_task: Callable[..., ImageTask],
) -> None:
    assert ImageTask.from_bytes(make_task(request_id="req_1").to_bytes()).request_id == "req_1"
    with pytest.raises(ValueError, match="request_id"):
        make_task(request_id="a\nforged line")


@pytest.fixture
def make_task() -> Callable[..., ImageTask]:
    return lambda **fields: ImageTask(prompt="dog", seed=1, index=0, width=64, height=64, **fields)
