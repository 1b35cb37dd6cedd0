"""What the benchmarks of the service rest on: the bare student's pixels, and how growth is judged."""

import asyncio
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flashbulb_service.bench.workload import Picture
from support.serving import run_flashbulb
from support.tiny_bundle import make_tiny_bundle

NO_PROCESS = 2**22 + 1  # above the largest process id
BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch):
    """Import a script of the folder as it sees itself: with that folder on its path."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return __import__(name)

    return load


def test_the_bare_student_draws_the_services_pixels(load_script, tmp_path: Path) -> None:
    student = load_script("student")
    make_tiny_bundle(tmp_path / "models")
    drawn = run_flashbulb(
        "generate", "red apple", "-o", tmp_path / "a.png", "--models", tmp_path / "models", "--seed", "5"
    )
    assert drawn.returncode == 0, drawn.stderr
    (bundle,) = (path.parent for path in (tmp_path / "models").glob("*/*/manifest.json"))
    bare = student.BareStudent(bundle, threads=1)
    other, ours = bare.draw([student.Ask("dog", 1), student.Ask("red apple", 5)])
    assert np.array_equal(ours, np.asarray(Image.open(tmp_path / "a.png").convert("RGB")))
    assert not np.array_equal(ours, other)


def test_what_a_server_is_compared_with_has_the_student_as_a_worker_has_it(load_script, monkeypatch) -> None:
    """The peers padded their prompts and lay on small pages: the model's savings were the server's."""
    student = load_script("student")
    moved = []
    monkeypatch.setattr(student, "use_huge_pages", lambda: moved.append(True))
    bare = student.open_as_worker(BENCHMARKS.parent / "models" / "emoji" / "1", threads=1, batch=2)
    assert moved
    assert bare.prepare([student.Ask("dog", 1)]).ids.shape[1] < bare.bundle.manifest.text[0].max_length
    for script in (
        "overhead.py",
        "peers.py",
        *(f"peers/{name}_app.py" for name in ("fastapi", "litserve", "ray")),
    ):
        text = (BENCHMARKS / script).read_text(encoding="utf-8")
        assert "open_as_worker(" in text and "BareStudent(" not in text, script


def test_growth_compares_the_ends_after_the_warm_up(load_script) -> None:
    rows = [{"at_s": float(at), "api": 50.0 + at if at < 25 else 100.0 + at / 10} for at in range(100)]
    growth = load_script("soak").growth_by_part(rows, 100.0)
    assert growth == {"api": pytest.approx((100 + 9.2) / (100 + 3.2) - 1, abs=1e-3)}
    assert load_script("soak").growth_by_part(rows[:10], 100.0) == {}


@pytest.mark.parametrize(
    ("first", "last", "good"),
    [
        (os.getpid(), os.getpid(), True),
        (os.getpid(), os.getppid(), False),
        (NO_PROCESS, NO_PROCESS, False),
    ],
    ids=["lives", "started again", "its memory could not be read"],
)
def test_a_soak_in_which_a_part_crashed_is_not_good(load_script, monkeypatch, first, last, good) -> None:
    """The samples before the crash were judged alone, and the part that was started again never looked at."""
    soak = load_script("soak")

    async def draw_one(_http, _rng, _until, outcomes, **_) -> None:
        outcomes["drawn"] += 1
        await asyncio.sleep(0)  # the watch has its turn

    async def has_jobs(_http) -> bool:
        return True

    for name, replacement in {
        "be_a_client": draw_one,
        "offers_jobs": has_jobs,
        "growth_by_part": lambda *_: {"worker": 0.0},
        "leftovers": lambda *_: {"live_jobs": 0, "keys_without_ttl": []},
    }.items():
        monkeypatch.setattr(soak, name, replacement)
    found = iter([first, last])
    server = SimpleNamespace(
        url="http://127.0.0.1:1", queue_url=lambda: "", pids=lambda: {"worker": next(found)}
    )
    verdict = asyncio.run(soak.soak(server, 1.0, 1, 0))["verdict"]
    assert (verdict["good"], verdict["parts_lived"]) == (good, good)


def test_no_two_pictures_share_a_prompt(load_script) -> None:
    pictures: list[Picture] = load_script("rig").different_pictures(500, first=100)
    assert len({picture.prompt for picture in pictures}) == 500


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["no-such-benchmark"], 2)])
def test_the_command_lists_what_there_is(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert all(
        name in done.stdout
        for name in (
            "student",
            "saturate",
            "overhead",
            "durability",
            "live",
            "chaos",
            "fuzz",
            "soak",
            "peers",
        )
    )


def test_the_page_lists_every_benchmark_and_each_takes_write(monkeypatch) -> None:
    """Four measured for minutes, and then refused `--write`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    known = importlib.import_module("benchmarks.__main__").BENCHMARKS
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == sorted(known)
    for script, _ in known.values():  # read, not imported: torch and diffusers take half a minute
        text = (BENCHMARKS / script).read_text(encoding="utf-8")
        assert re.search(r"parser = rig\.(plain_)?arguments\(__doc__\)", text), script
        assert re.search(r"rig\.finish\([^\n]*write=", text), script


def test_a_result_is_kept_where_it_was_asked_to_be(load_script, monkeypatch, tmp_path: Path) -> None:
    rig = load_script("rig")
    monkeypatch.setattr(rig, "RESULTS", tmp_path)
    rig.finish("a", {"x": 1}, write=True, out=tmp_path / "b.json")
    rig.finish("c", {"x": 1}, write=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((tmp_path / "b.json").read_text())
