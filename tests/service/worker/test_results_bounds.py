"""Finished pictures are bounded by bytes as well as by time, and private."""

import os
import time
from pathlib import Path

from flashbulb_service.results import ResultStore


async def test_the_oldest_pictures_go_when_the_store_is_too_large(tmp_path: Path) -> None:
    store = ResultStore((tmp_path / "results").as_uri(), ttl_s=100, max_bytes=250)
    for age, name in enumerate(("new.png", "middle.png", "old.png")):
        await store.put(name, bytes(100))
        os.utime(tmp_path / "results" / name, (1000 - age, 1000 - age))
    (tmp_path / "results" / "not-ours.txt").write_bytes(bytes(1000))
    assert store.clean(now=1000) == 1
    assert await store.get("old.png") is None
    assert await store.get("new.png") == await store.get("middle.png") == bytes(100)
    assert store.clean(now=1000) == 0
    assert (tmp_path / "results" / "not-ours.txt").exists()


async def test_a_folder_of_results_is_closed_to_others(tmp_path: Path) -> None:
    store = ResultStore((tmp_path / "results").as_uri(), ttl_s=100)
    await store.put("a.png", b"picture")
    assert (tmp_path / "results").stat().st_mode & 0o077 == 0


async def test_what_a_killed_worker_was_writing_is_cleaned_and_never_served(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    store = ResultStore(folder.as_uri(), ttl_s=100)
    for age, name in ((0, ".a.png.1234.part"), (200, ".b.png.5678.part")):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (1000 - age, 1000 - age))
    store.clean(now=1000)
    assert [path.name for path in folder.iterdir()] == [".a.png.1234.part"]
    assert await store.get(".a.png.1234.part") is None


def test_a_written_picture_is_whole_and_alone(tmp_path: Path) -> None:
    store = ResultStore((tmp_path / "results").as_uri(), ttl_s=100)
    store.write("a.png", b"first")
    store.write("a.png", b"second")
    assert {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()} == {"a.png": b"second"}


def test_a_prepared_file_becomes_the_next_picture(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    store = ResultStore(folder.as_uri(), ttl_s=100)
    store.prepare()
    store.prepare()
    [prepared] = folder.iterdir()
    number = prepared.stat().st_ino
    store.write("a.png", b"picture")
    assert [(path.name, path.stat().st_ino) for path in folder.iterdir()] == [("a.png", number)]
    store.write("b.png", b"other")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "a.png": b"picture",
        "b.png": b"other",
    }


def test_a_prepared_file_that_was_cleaned_away_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    store = ResultStore(folder.as_uri(), ttl_s=100)
    store.prepare()
    store.clean(now=time.time() + 1000)
    assert list(folder.iterdir()) == []
    store.write("a.png", b"picture")
    assert (folder / "a.png").read_bytes() == b"picture"


def test_what_was_prepared_in_vain_is_deleted(tmp_path: Path) -> None:
    store = ResultStore((tmp_path / "results").as_uri(), ttl_s=100)
    store.prepare()
    store.close()
    assert list((tmp_path / "results").iterdir()) == []
