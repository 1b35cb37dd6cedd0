"""A rolling restart loses nothing; and the benchmark that says so can say otherwise."""

import importlib
import json
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmarks" / "rolling.py"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_replacing_every_part_under_load_fails_no_request_and_loses_no_job(
    rolling: ModuleType,
) -> None:
    known = ["git", "cat-file", "-e", f"{rolling.BEFORE}^{{commit}}"]
    if subprocess.run(known, cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip(f"needs a git checkout with {rolling.BEFORE}, the version before")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rate", "5", "--first", "apis"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)["apis_first"]
    assert result["answers"].keys() == {"200"}
    assert result["jobs"].keys() == {"completed"}
    assert result["latency_ms"].keys() == {"before", "rolling", "after"}


@pytest.mark.parametrize(
    ("planted", "part"),
    [
        ({"_answers": Counter({"200": 99, "502": 1})}, "no_request_failed"),
        ({"exits": [0, 0, -9, 0]}, "clean_exits"),
    ],
    ids=["one request failed", "one part was killed"],
)
async def test_a_planted_failure_spoils_the_verdict(
    planted: dict[str, object], part: str, rolling: ModuleType
) -> None:
    load = rolling.Load(None, "", 1.0)
    load._answers, load.exits = Counter({"200": 100}), [0, 0, 0, 0]
    load.old = load.new = {7: png(100)}
    assert (await load.result())["verdict"]["versions_agree"]
    for name, value in planted.items():
        setattr(load, name, value)
    verdict = (await load.result())["verdict"]
    assert not verdict[part]
    assert not verdict["good"]


OLD, NEW = 100, 101  # a channel that two versions round apart


@pytest.mark.parametrize(
    ("seen", "value", "part"),
    [
        ({"came": "before"}, NEW, "one_file_per_version"),
        ({"asked": "after", "came": "after"}, OLD, "one_file_per_version"),
        ({}, 102, "one_file_per_version"),
        ({"keyed": True}, NEW, "replays_equal"),
    ],
    ids=[
        "the old version drew two files for one seed",
        "the new version drew two files for one seed",
        "a picture of neither version",
        "a replay that is not its first answer",
    ],
)
def test_a_wrong_picture_spoils_its_part_of_the_verdict(
    seen: dict[str, str | bool], value: int, part: str, rolling: ModuleType
) -> None:
    good = [
        rolling.Drawn(7, png(OLD), asked="before", came="before"),
        rolling.Drawn(7, png(OLD), keyed=True, asked="before"),
        rolling.Drawn(7, png(NEW)),
        rolling.Drawn(7, png(OLD), keyed=True, asked="after", came="after"),  # still the replay
        rolling.Drawn(7, png(NEW), asked="after", came="after"),
    ]
    verdict, _ = rolling.judge_pictures(good, {7: png(OLD)}, {7: png(NEW)})
    assert all(verdict.values())
    wrong = rolling.Drawn(7, png(value), **seen)
    verdict, _ = rolling.judge_pictures([*good, wrong], {7: png(OLD)}, {7: png(NEW)})
    assert not verdict[part]


@pytest.mark.parametrize(("value", "agree"), [(100, True), (102, True), (103, False), (97, False)])
def test_versions_agree_within_a_rounding_of_two_and_the_difference_is_told(
    value: int, agree: bool, rolling: ModuleType
) -> None:
    verdict, told = rolling.judge_pictures([], {1: png(100), 2: png(7)}, {1: png(value), 2: png(7)})
    assert verdict["versions_agree"] is agree
    assert told == {"pictures": 2, "differ": int(value != 100), "largest_of_255": abs(value - 100)}


@pytest.fixture
def rolling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("aiohttp")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("rolling")


def png(value: int) -> bytes:
    """Return a picture of one grey pixel."""
    file = BytesIO()
    Image.new("RGB", (1, 1), (value, value, value)).save(file, "png")
    return file.getvalue()
