"""Finished pictures are bounded by bytes as well as by time, and private."""

import os
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
