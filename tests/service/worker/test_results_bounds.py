"""Finished pictures are bounded by bytes as well as by time, and private."""

import os
import random
import time
import tracemalloc
from pathlib import Path

import pytest

from flashbulb_service import results
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


def test_cleaning_that_keeps_few_files_in_mind_deletes_what_a_sorted_list_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "AT_ONCE", 2)
    rng, folder = random.Random(0), tmp_path / "results"
    for _ in range(40):
        store = ResultStore(folder.as_uri(), ttl_s=100, max_bytes=rng.randrange(2500))
        ages = rng.sample(range(200), rng.randrange(12))
        files = {f"{age}.png": (age, rng.randrange(400)) for age in ages}
        for name, (age, size) in files.items():
            (folder / name).write_bytes(bytes(size))
            os.utime(folder / name, (1000 - age, 1000 - age))
        wanted, total = set(), 0
        for name, (age, size) in sorted(files.items(), key=lambda file: file[1]):  # the newest first
            total += size
            if age <= 100 and total <= store.max_bytes:
                wanted.add(name)
        assert store.clean(now=1000) == len(files) - len(wanted)
        assert {path.name for path in folder.iterdir()} == wanted
        for path in folder.iterdir():
            path.unlink()


def test_cleaning_takes_no_more_memory_for_more_files(tmp_path: Path) -> None:
    store = ResultStore((tmp_path / "results").as_uri(), ttl_s=1e6)

    def peak(num_files: int) -> int:
        for number in range(num_files):
            (tmp_path / "results" / f"{'a' * 32}-{number}.png").touch()
        tracemalloc.start()
        store.clean()
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    few = peak(results.AT_ONCE)
    assert peak(5 * results.AT_ONCE) < 1.2 * few


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
