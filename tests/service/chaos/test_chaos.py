"""Workers, APIs and Valkey are killed at random in the middle of the work: nothing lost, nothing twice, equal bytes.

The long form: python -m benchmarks chaos
"""

import asyncio
import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.serving import clean_env
from support.tiny_bundle import make_tiny_bundle

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
ROUGH = {
    "kills": {"worker": 1, "api": 1},
    "states": {"completed": 3},
    "ends": {1: 3},
    "jobs_stored": 3,
    "digests": {0: "a", 1: "b", 2: "c"},
}
LEFT = {"live_jobs": 0, "keys_without_ttl": []}


@pytest.mark.timeout(180)
def test_kills_at_random_lose_nothing_and_change_no_byte(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "models")
    run = subprocess.run(
        [
            *(sys.executable, BENCHMARKS / "chaos.py", "--bundle", bundle),
            *("--jobs", "80", "--kills", "6", "--seed", "3"),
        ],
        capture_output=True,
        text=True,
        env=clean_env(),
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    told = json.loads(run.stdout)
    assert told["chaos"]["kills"] == {"worker": 2, "api": 2, "valkey": 2}


@pytest.mark.parametrize("kind", ["valkey", "worker"])
def test_a_kill_that_hits_nothing_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Valkey was still down from the last kill, nothing was hit, and the plan was said to be carried out."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    chaos = __import__("chaos")
    monkeypatch.setattr(chaos, "BACK_S", 0.0)
    monkeypatch.setattr(chaos, "count_jobs", lambda _: 0)
    monkeypatch.setattr(chaos.Fleet, "start", lambda _: None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    server = SimpleNamespace(pid=None, url="")
    fleet = chaos.Fleet(tmp_path, server, {}, ports=(1, 2), workers=[ended])
    rough = asyncio.run(chaos.drive(fleet, 0, [(0, kind)], seed=0))
    assert rough["kills"] == {kind: 0}
    assert not chaos.judge(rough, rough, LEFT, 0, 1)[0]["killed_as_planned"]


@pytest.mark.parametrize("kind", ["valkey", "api", "worker"])
def test_a_kill_before_its_victim_is_at_work_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_url: str, kind: str
) -> None:
    """It hit Python while that was still importing, or before it became Valkey: nothing of ours was interrupted."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    chaos = __import__("chaos")
    monkeypatch.setattr(chaos, "BACK_S", 0.0)
    monkeypatch.setattr(chaos.Fleet, "start", lambda _: None)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as starting:
        port = chaos.free_port()
        fleet = chaos.Fleet(
            tmp_path, SimpleNamespace(pid=starting.pid, url=redis_url), {}, ports=(port, port)
        )
        fleet.apis, fleet.workers = {port: starting}, [starting]
        assert not fleet.kill(kind, random.Random(0))
        starting.kill()


@pytest.mark.parametrize(
    ("fault", "told_by"),
    [
        ({}, None),
        ({"kills": {"worker": 1}}, "killed_as_planned"),
        ({"states": {"completed": 2, "queued": 1}}, "none_lost"),
        ({"states": {"completed": 2, "failed": 1}}, "none_lost"),
        ({"ends": {1: 2, 2: 1}}, "none_double"),
        ({"jobs_stored": 4}, "none_double"),
        ({"digests": {0: "a", 1: "x", 2: "c"}}, "equal_bytes"),
        ({"left": {"live_jobs": 1, "keys_without_ttl": []}}, "queue_empty"),
        ({"left": {"live_jobs": 0, "keys_without_ttl": ["{x}:leak"]}}, "queue_empty"),
    ],
)
def test_each_broken_promise_has_its_verdict(
    monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any], told_by: str | None
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    chaos = __import__("chaos")
    rough, left = copy.deepcopy(ROUGH) | fault, fault.get("left", LEFT)
    verdict, _ = chaos.judge(rough, ROUGH, left, 3, 2)
    assert [name for name, good in verdict.items() if not good] == ([told_by] if told_by else [])
