"""Bundles from a store: whole or not there, fetched once, gone on with where they broke off, within bounds."""

import asyncio
import contextlib
import logging
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import obstore
import pytest
from obstore.store import S3Store

from flashbulb_distill.bundle import list_models, open_bundle
from flashbulb_service import model_store
from flashbulb_service.errors import InvalidRequest, ModelStoreUnavailable
from flashbulb_service.model_store import Follower, ModelStore, fetch_first, for_manifests, keep_following
from flashbulb_service.settings import Settings, read_settings
from support.bucket import Bucket
from support.serving import Serving, run_flashbulb
from support.tiny_bundle import make_tiny_bundle


@pytest.fixture
def shelf(tmp_path: Path, models_dir: Path) -> Path:
    """A repository of two versions, as somebody uploads it."""
    folder = tmp_path / "shelf"
    shutil.copytree(models_dir, folder)
    make_tiny_bundle(folder, version=2)
    return folder


@pytest.fixture
def bucket(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with Bucket(shelf) as bucket:
        for name, value in bucket.environment().items():
            monkeypatch.setenv(name, value)
        yield bucket


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "data" / "models"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "PIECE_BYTES", 20_000)


def follow(here: Path, url: str = "s3://models", wanted: set[str] | None = None, **options: Any) -> Follower:
    options = {"max_bytes": 1 << 30, **options}
    return Follower(ModelStore(url, frozenset(wanted or ())), here, **options)


def content(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    names = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    return {name: data for name, data in names.items() if not name.startswith(model_store.STAGING)}


def models_at(here: Path) -> list[str]:
    return [f"{name}@{version}" for name, version, _ in list_models(here)]


@pytest.mark.parametrize("kind", ["s3", "http", "file"])
def test_what_is_fetched_is_what_the_store_has_and_is_fetched_once(
    bucket: Bucket, shelf: Path, here: Path, kind: str
) -> None:
    url = {"s3": "s3://models", "http": f"{bucket.endpoint}/models", "file": shelf.as_uri()}[kind]
    follower = follow(here, url, {"tiny@1", "tiny@2"})
    assert follower.look() == ["tiny@1", "tiny@2"]
    assert content(here) == content(shelf)
    assert not [one for one in (here / model_store.STAGING).iterdir() if one.is_dir()]
    for _, _, path in list_models(here):
        open_bundle(path, verify=True)
    bucket.asked.clear()
    assert follower.look() == []
    assert {path.rpartition("/")[2] for _, path, _ in bucket.asked} <= {"manifest.json"}
    assert bucket.keys == ({"AKIDTEST"} if kind == "s3" else set())


@pytest.mark.skipif(shutil.which("moto_server") is None, reason="moto_server is not installed")
def test_another_s3_server_is_read_as_well(
    shelf: Path, here: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(["moto_server", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"http://127.0.0.1:{port}/models", method="PUT")
                urllib.request.urlopen(request).close()
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        store = S3Store("models")
        for name, data in content(shelf).items():
            obstore.put(store, f"students/{name}", data)
        assert follow(here, "s3://models/students").look() == ["tiny@1", "tiny@2"]
        assert content(here) == content(shelf)
    finally:
        server.kill()
        server.wait()


def test_a_fetch_that_broke_off_goes_on_and_nothing_shows_before_it_is_whole(
    bucket: Bucket, shelf: Path, here: Path, small_pieces: None
) -> None:
    served = 0

    def refuse_after_a_while(path: str, start: int) -> int | None:
        nonlocal served
        assert models_at(here) == []
        served += not path.endswith("manifest.json")
        return 403 if served > 4 else None

    bucket.fault = refuse_after_a_while
    follower = follow(here, wanted={"tiny@1"})
    with pytest.raises(ModelStoreUnavailable, match=r"tiny/1/.*: expected an answer"):
        follower.look()
    assert models_at(here) == []
    before = [one for one in bucket.asked if one[0] == "GET"][:-1]
    bucket.asked.clear()
    bucket.fault = lambda path, start: None
    assert follower.look() == ["tiny@1"]
    assert content(here / "tiny" / "1") == content(shelf / "tiny" / "1")
    again = [one for one in bucket.asked if one[0] == "GET" and not one[1].endswith("manifest.json")]
    assert again and not set(again) & set(before)


def test_damage_is_refused_with_both_hashes_and_mended_later(
    bucket: Bucket, shelf: Path, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = (shelf / "tiny" / "1" / "denoiser.onnx").read_bytes()
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    bucket.fault = lambda path, start: wrong if path == "tiny/1/denoiser.onnx" else None
    follower = follow(here)
    assert follower.look() == ["tiny@2"]
    assert models_at(here) == ["tiny@2"]
    assert re.search(r"tiny@1 was not fetched.*expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}", caplog.text)
    bucket.fault = lambda path, start: None
    assert follower.look() == ["tiny@1"]
    open_bundle(here / "tiny" / "1", verify=True)


def test_a_bundle_without_its_manifest_is_not_there_yet(bucket: Bucket, shelf: Path, here: Path) -> None:
    (shelf / "tiny" / "1" / "manifest.json").rename(shelf / "kept")
    follower = follow(here)
    assert follower.look() == ["tiny@2"]
    (shelf / "kept").rename(shelf / "tiny" / "1" / "manifest.json")
    assert follower.look() == ["tiny@1"]


def test_a_manifest_of_another_model_is_refused(
    bucket: Bucket, shelf: Path, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(shelf / "tiny", shelf / "other")
    assert follow(here, wanted={"other"}).look() == []
    assert "expected the manifest of other@1, got tiny@1" in caplog.text


def test_only_what_is_wanted_is_fetched_and_what_left_the_store_goes(
    bucket: Bucket, shelf: Path, here: Path
) -> None:
    make_tiny_bundle(shelf, name="other")
    assert follow(here, wanted={"tiny@2", "other"}).look() == ["other@1", "tiny@2"]
    shutil.rmtree(shelf / "other")
    follower = follow(here)
    assert follower.look() == ["tiny@1"]
    assert models_at(here) == ["tiny@1", "tiny@2"]
    shutil.rmtree(shelf / "tiny")
    assert follower.look() == []
    assert models_at(here) == ["tiny@1", "tiny@2"]  # an empty store is rather a mistake than a wish


def test_a_version_that_was_exported_again_is_replaced(bucket: Bucket, shelf: Path, here: Path) -> None:
    follower = follow(here, wanted={"tiny@1"})
    follower.look()
    shutil.rmtree(shelf / "tiny" / "1")
    make_tiny_bundle(shelf, max_batch=4)
    assert follower.look() == ["tiny@1"]
    assert content(here / "tiny" / "1") == content(shelf / "tiny" / "1")


def test_an_api_takes_manifests_alone(bucket: Bucket, shelf: Path, here: Path) -> None:
    follow(here, manifests_only=True).look()
    assert sorted(content(here)) == ["tiny/1/manifest.json", "tiny/2/manifest.json"]
    settings = Settings(models_url="s3://models", data=here.parent)
    assert (settings.models, for_manifests(settings).models) == (here, here.parent / "manifests")


def test_a_look_is_bounded_by_bytes_by_the_disk_and_by_the_manifest(
    bucket: Bucket, here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InvalidRequest, match="models_max_bytes: expected bundles of at most 1000 bytes"):
        follow(here, max_bytes=1000).look()
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=model_store.SPARE_BYTES))
    with pytest.raises(InvalidRequest, match="MB free at"):
        follow(here).look()
    monkeypatch.setattr(model_store, "MAX_MANIFEST_BYTES", 100)
    assert follow(here).look() == []
    assert "expected at most 100 bytes" in caplog.text
    assert models_at(here) == []


@pytest.mark.parametrize(
    "url", ["https://me:secret@host/x", "https://host/x?token=secret", "s3://host/x#secret"]
)
def test_an_address_with_more_than_an_address_is_refused_without_telling_it(url: str) -> None:
    with pytest.raises(InvalidRequest, match="AWS_ACCESS_KEY_ID") as refused:
        ModelStore(url)
    assert "secret" not in refused.value.message


def test_errors_and_logs_tell_no_secret(bucket: Bucket, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    bucket.fault = lambda path, start: 403
    with pytest.raises(ModelStoreUnavailable) as refused:
        follow(here).look()
    told = caplog.text + refused.value.message + repr(refused.value.__cause__)
    assert "very-secret-word" not in told and "AKIDTEST" not in told
    assert refused.value.message.startswith("s3://models/tiny/1/manifest.json: expected an answer")


def test_a_store_that_cannot_be_listed_wants_versions(bucket: Bucket, here: Path) -> None:
    for wanted in (set[str](), {"tiny"}):
        with pytest.raises(InvalidRequest, match="names with versions"):
            follow(here, f"{bucket.endpoint}/models", wanted).look()


def test_without_the_store_what_was_fetched_before_is_served(
    bucket: Bucket, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(models_url="s3://models", data=here.parent)
    bucket.fault = lambda path, start: 403
    with pytest.raises(ModelStoreUnavailable):
        fetch_first(settings)
    bucket.fault = lambda path, start: None
    assert fetch_first(settings) == ["tiny@1", "tiny@2"]
    bucket.fault = lambda path, start: 403
    assert fetch_first(settings) == []
    assert "serving the 2 versions that were fetched before" in caplog.text


async def test_following_survives_an_outage_and_ends_at_once(
    bucket: Bucket, here: Path, wait_until: Callable[..., Awaitable[None]]
) -> None:
    async def asked() -> bool:
        return bool(bucket.asked)

    async def there() -> bool:
        return models_at(here) == ["tiny@1", "tiny@2"]

    bucket.fault = lambda path, start: 403
    settings = Settings(models_url="s3://models", data=here.parent, models_poll_s=0.01)
    following = asyncio.create_task(keep_following(settings))
    await wait_until(asked)
    bucket.fault = lambda path, start: None
    await wait_until(there)
    following.cancel()
    await asyncio.wait([following], timeout=5)
    assert following.cancelled()


def test_models_may_name_a_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHBULB_DATA", str(tmp_path))
    monkeypatch.setenv("FLASHBULB_MODELS", "s3://bucket/students")
    settings = read_settings()
    assert (settings.models_url, settings.models) == ("s3://bucket/students", tmp_path / "models")
    assert read_settings(models=str(tmp_path)).models == tmp_path
    assert Settings(models_url="", models=tmp_path).models_url is None


@pytest.mark.slow
def test_serve_draws_a_model_of_a_bucket_and_finds_the_next_version(
    bucket: Bucket, shelf: Path, tmp_path: Path
) -> None:
    shutil.move(shelf / "tiny" / "2", tmp_path / "later")
    settings = {"models_poll_s": "0.2"}
    with Serving("s3://models", tmp_path / "data", **settings) as serving:  # type: ignore[arg-type]

        def models() -> list[str]:
            return httpx2.get(f"{serving.url}/readyz").json()["models"]

        assert models() == ["tiny@1"]
        body = {"prompt": "dog", "seed": 1}
        assert httpx2.post(f"{serving.url}/v1/images/generations", json=body, timeout=20).status_code == 200
        shutil.move(tmp_path / "later", shelf / "tiny" / "2")
        deadline = time.monotonic() + 20
        while models() != ["tiny@1", "tiny@2"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_fetch_tells_what_it_did(bucket: Bucket, tmp_path: Path) -> None:
    done = run_flashbulb("models", "fetch", "--models", "s3://models", "--data", tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line.split("\t")[:2] for line in done.stdout.splitlines()]
    assert told == [["tiny@1", "fetched"], ["tiny@2", "fetched"]]
