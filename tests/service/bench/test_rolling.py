"""A rolling restart loses nothing; and the benchmark that says so can say otherwise."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmarks" / "rolling.py"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_replacing_every_part_under_load_fails_no_request_and_loses_no_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pytest.importorskip("aiohttp")
    import rolling

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
        ({"_pixels": {7: {"a", "b"}}}, "equal_pixels"),
        ({"exits": [0, 0, -9, 0]}, "clean_exits"),
    ],
    ids=["one request failed", "one picture differs", "one part was killed"],
)
async def test_a_planted_failure_spoils_the_verdict(
    planted: dict[str, object], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import rolling

    load = rolling.Load(None, "", 1.0)
    load._answers, load._pixels, load.exits = Counter({"200": 100}), {7: {"a"}}, [0, 0, 0, 0]
    for name, value in planted.items():
        setattr(load, name, value)
    verdict = (await load.result())["verdict"]
    assert not verdict[part]
    assert not verdict["good"]
