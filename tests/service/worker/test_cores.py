"""Threads by default: the cores of this process, on any system, or what its container may use of them."""

import os
from pathlib import Path

import pytest

from flashbulb_service.cores import usable_cores


def test_cores_are_those_this_process_may_use(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_without_affinity_all_cores_count_and_at_least_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1


@pytest.mark.parametrize(
    "quota_us, cores", [(200_000, 2), (150_000, 2), (20_000, 1), (9_900_000, 64), (None, 64)]
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_processors_bounds_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int, quota_us: int | None, cores: int
) -> None:
    """A pod with two processors on a node of 64 cores sees all of these, and ran 64 threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    if version == 2:
        (tmp_path / "cpu.max").write_text(f"{quota_us or 'max'} 100000\n", encoding="ascii")
    else:
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota_us or -1}\n", encoding="ascii")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n", encoding="ascii")
    assert usable_cores(tmp_path) == cores
