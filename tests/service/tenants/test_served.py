"""Keys on a real server: the unmodified OpenAI client, the command line beside it, a public address."""

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx2
import openai
import pytest
from openai import OpenAI

from flashbulb_service.jobs import JobError, NewJob
from flashbulb_service.queue import Kept, Queue
from flashbulb_service.tenants.keys import DAY_S, KeyLimits
from flashbulb_service.tenants.store import KeyStore
from support.serving import FLASHBULB, Serving, clean_env, run_flashbulb


def make_key(data: Path, limits: KeyLimits | None = None, *scopes: str) -> tuple[str, str]:
    """Make a key beside the server, as another process would."""

    async def make() -> tuple[str, str]:
        url = json.loads((data / "queue" / "server.json").read_text())["url"]
        async with Queue.connect(url) as queue:
            made = await KeyStore(queue).create("test", scopes or ("generate",), limits)
        return made.record.id, made.secret

    return asyncio.run(make())


def create_key(data: Path, *arguments: str) -> tuple[str, str]:
    """Make a key with the command line."""
    done = run_flashbulb("keys", "create", "test", *arguments, "--data", data)
    assert done.returncode == 0, done.stderr
    found = re.search(r"key_[0-9a-f]{16}", done.stderr)
    assert found is not None and done.stdout.count("\n") == 1
    return found[0], done.stdout.strip()


@pytest.fixture(scope="module")
def serving(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(models_dir, tmp_path_factory.mktemp("served") / "data", auth="keys") as serving:
        yield serving


def client(serving: Serving, secret: str) -> OpenAI:
    return OpenAI(base_url=f"{serving.url}/v1", api_key=secret, max_retries=0)


def test_the_openai_client_raises_its_own_errors(serving: Serving) -> None:
    key_id, secret = make_key(serving.data, KeyLimits(requests_per_minute=1, burst=2))
    _, admin = make_key(serving.data, None, "admin")
    with client(serving, "none") as nobody, pytest.raises(openai.AuthenticationError) as refused:
        nobody.images.generate(prompt="dog")
    assert refused.value.code == "invalid_api_key" and refused.value.request_id
    with client(serving, admin) as running, pytest.raises(openai.PermissionDeniedError) as forbidden:
        running.images.generate(prompt="dog")
    assert forbidden.value.code == "missing_scope"
    with client(serving, secret) as drawing:
        answer = drawing.images.with_raw_response.generate(prompt="dog", n=2)
        assert answer.headers["x-ratelimit-remaining-requests"] == "1"
        pictures = answer.parse().data
        assert pictures is not None and len(pictures) == 2
        drawing.images.generate(prompt="dog")
        with pytest.raises(openai.RateLimitError) as limited:
            drawing.images.generate(prompt="dog")
        assert limited.value.code == "rate_limit_exceeded"
        assert [model.id for model in drawing.models.list()] == ["tiny"]
    usage = run_flashbulb("keys", "usage", key_id, "--data", serving.data).stdout.splitlines()
    _day, requests, refusals, images, device_ms = usage[1].split("\t")
    assert (requests, refusals, images) == ("2", "1", "3")
    assert float(device_ms) > 0


def test_a_budget_is_spent_by_what_the_device_did(serving: Serving) -> None:
    _, secret = make_key(serving.data, KeyLimits(budget_ms=1, budget_period_s=31 * DAY_S))
    with client(serving, secret) as drawing:
        with pytest.raises(openai.RateLimitError) as spent:
            for _ in range(50):  # the tiny model takes less than a millisecond at times
                drawing.images.generate(prompt="dog", n=10)
        assert spent.value.code == "budget_exceeded"


def test_a_picture_is_shown_to_whoever_has_its_address(serving: Serving) -> None:
    _, secret = make_key(serving.data)
    with client(serving, secret) as drawing:
        pictures = drawing.images.generate(prompt="dog", response_format="url").data
    assert pictures is not None and pictures[0].url is not None
    assert httpx2.get(pictures[0].url, timeout=30).content.startswith(b"\x89PNG")


def test_the_command_line_rotates_revokes_and_lists(serving: Serving) -> None:
    key_id, secret = create_key(serving.data, "--scope", "generate", "--scope", "admin", "--max-live", "4")
    on_data = ("--data", serving.data)
    changed = run_flashbulb("keys", "limits", key_id, "--rpm", "9", "--max-live", "0", *on_data)
    assert '"requests_per_minute":9' in changed.stdout and '"max_live":null' in changed.stdout
    rotated = run_flashbulb("keys", "rotate", key_id, "--grace-s", "0", *on_data).stdout.strip()
    with client(serving, secret) as old, pytest.raises(openai.AuthenticationError):
        old.images.generate(prompt="dog")
    with client(serving, rotated) as new:
        new.images.generate(prompt="dog")
        assert run_flashbulb("keys", "revoke", key_id, *on_data).stdout == f"{key_id}\trevoked\n"
        with pytest.raises(openai.AuthenticationError):
            new.images.generate(prompt="dog")
    assert f"{key_id}\trevoked\tgenerate+admin\ttest" in run_flashbulb("keys", "list", *on_data).stdout
    again = run_flashbulb("keys", "revoke", key_id, *on_data)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert run_flashbulb("keys", "create", "a", "--weight", "0", *on_data).returncode == 2


def test_the_command_line_pauses_and_resumes_a_running_server(serving: Serving) -> None:
    on_data = ("--data", serving.data)
    _, secret = make_key(serving.data)
    headers = {"authorization": f"Bearer {secret}"}
    assert run_flashbulb("queue", "pause", "tiny@1", *on_data).stdout == "tiny@1\tpaused\n"
    job = httpx2.post(f"{serving.url}/v1/jobs", json={"prompt": "dog"}, headers=headers, timeout=30).json()
    stats = run_flashbulb("queue", "stats", *on_data).stdout
    assert "tiny@1\t1 queued\tpaused" in stats
    assert run_flashbulb("queue", "resume", "tiny@1", *on_data).stdout == "tiny@1\topen\n"
    with httpx2.stream(
        "GET", f"{serving.url}/v1/jobs/{job['id']}/events", headers=headers, timeout=20
    ) as events:
        assert "job.completed" in events.read().decode()
    assert run_flashbulb("queue", "dead", "list", *on_data).stdout == ""
    assert run_flashbulb("queue", "dead", "replay", "none", *on_data).returncode == 1
    assert run_flashbulb("queue", "pause", "tiny@x", *on_data).returncode == 2


def test_a_dead_job_that_cannot_be_replayed_keeps_no_other_from_it(redis_url: str, namespace: str) -> None:
    """The first of them ended the command, and those behind it were never tried."""
    job = NewJob("tiny@1", "64x64", b"p")

    async def make_dead() -> list[str]:
        async with Queue.connect(redis_url, namespace=namespace) as queue:
            [deleted] = (await queue.enqueue([job], keep=Kept(b"record", "me"))).ids
            ids = [deleted, *(await queue.enqueue([job] * 2)).ids]
            for one in await queue.claim("w", ["tiny@1"], 3, 10.0):
                await queue.fail("w", one, JobError("broken", "no"), retry=False)
            view = await queue.request(deleted)
            assert view is not None and await queue.forget(view, ())
        return ids

    deleted, *good = asyncio.run(make_dead())
    done = run_flashbulb(
        *("queue", "dead", "replay", deleted, good[0], "none", good[1]), redis=redis_url, namespace=namespace
    )
    told = dict(line.split("\t") for line in done.stdout.splitlines())
    assert list(told) == [deleted, good[0], "none", good[1]]
    assert "deleted or has expired" in told[deleted] and "queued" not in told["none"]
    assert [told[job_id] for job_id in good] == ["queued", "queued"]
    assert (done.returncode, done.stderr) == (2, "")


def test_a_public_address_starts_with_a_key_and_asks_for_it(models_dir: Path, tmp_path: Path) -> None:
    """The key is made before there is a server: the command runs the queue's Valkey for as long as it needs."""
    data = tmp_path / "data"
    _, secret = create_key(data)
    with Serving(models_dir, data, "--host", "0.0.0.0") as serving:
        address = serving.url.replace("0.0.0.0", "127.0.0.1")
        get = partial(httpx2.get, timeout=30)
        assert get(f"{address}/readyz").status_code == 200
        assert get(f"{address}/").status_code == 200
        assert get(f"{address}/v1/models").status_code == 401
        headers = {"authorization": f"Bearer {secret}"}
        assert get(f"{address}/v1/models", headers=headers).status_code == 200
        assert get(f"{address}/metrics", headers=headers).status_code == 403


def test_the_api_alone_refuses_a_public_address_without_keys(redis_url: str, models_dir: Path) -> None:
    command = [
        *FLASHBULB,
        "api",
        "--redis",
        redis_url,
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        "--models",
        models_dir,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=clean_env(namespace="nobody")
    )
    assert done.returncode == 2
    assert done.stderr.startswith("flashbulb: ") and "flashbulb keys create" in done.stderr
