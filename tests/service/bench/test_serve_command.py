"""`flashbulb bench serve`, as a user runs it, against a real server; its percentiles against queueing theory."""

import asyncio
import itertools
import json
import math
import re
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from flashbulb_service import cli
from flashbulb_service.bench.arrivals import draw_offsets
from flashbulb_service.bench.client import Sample
from flashbulb_service.bench.openloop import Run
from flashbulb_service.bench.plot import draw_plot, nice_ceiling
from flashbulb_service.bench.report import Slo, Trust, measure, summarise
from flashbulb_service.bench.workload import Planned
from support.serving import FLASHBULB, Serving, clean_env, run_flashbulb
from support.small_server import ANYBODY, PICTURE, answer, load, serving
from support.tiny_bundle import make_tiny_bundle

QUICK = ("--seconds", "1", "--warm-up", "0.2", "--pool", "6", "--slo-ms", "20000", "--timeout", "20")
# simulated percentiles of 200,000 arrivals beside theory; measured: at most 1.4 % off
PERCENTILE_TOLERANCE = 0.03


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("bench")
    make_tiny_bundle(folder / "models")
    with Serving(folder / "models", folder / "data") as running:
        yield f"{running.url}/v1"


def test_rates_and_multiples_of_capacity_give_result_table_and_plot(server: str, tmp_path: Path) -> None:
    done = run_flashbulb(
        *("bench", "serve", "--base-url", server, *QUICK, "--rate", "10", "--rate", "0.5x"),
        *("--repeats", "2", "--capacity-seconds", "1", "--concurrency", "4", "--n", "1=3", "--n", "2=1"),
        *("--api-key", "secret-of-a-test", "--out", tmp_path / "load"),
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "load" / "result.json").read_text()
    result = json.loads(text)
    fixed, relative = result["points"]
    assert (fixed["rate"], relative["rate"]) == ("10", "0.5x")
    assert fixed["summary"]["offered_rps"] == 10
    assert relative["summary"]["offered_rps"] == pytest.approx(result["capacity_rps"] / 2, rel=1e-3)
    assert [repeat["valid"] for repeat in fixed["repeats"]] == [1, 1]
    assert fixed["summary"]["goodput_rps"]["ci95"] is not None
    assert all(repeat["goodput_rps"] == repeat["sent_rps"] for repeat in fixed["repeats"])
    assert result["plan"]["mix"]["counts"] == [[1, 3.0], [2, 1.0]]
    assert "secret-of-a-test" not in text + done.stdout + done.stderr
    assert done.stdout.strip() == (tmp_path / "load" / "table.md").read_text().strip()
    assert ElementTree.parse(tmp_path / "load" / "plot.svg").getroot().tag.endswith("svg")


def test_a_trace_is_replayed_at_the_rate_asked_for(server: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "\n".join(json.dumps({"offset_s": i / 2, "prompt": f"dog {i % 3}", "seed": 1}) for i in range(9))
    )
    done = run_flashbulb(
        *("bench", "serve", "--base-url", server, "--trace", trace, "--rate", "9", "--warm-up", "0"),
        *("--repeats", "1", "--slo-ms", "20000", "--out", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    told = result["points"][0]["repeats"][0]
    assert (told["sent"], told["valid"], result["plan"]["trace_rows"]) == (
        8,
        1,
        9,
    )  # the last is due at the end


def test_ctrl_c_writes_what_there_is(server: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *FLASHBULB,
            "bench",
            "serve",
            "--base-url",
            server,
            *QUICK,
            "--rate",
            "5",
            "--repeats",
            "100",
            "--out",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_env(),
    )
    assert process.stderr is not None
    assert any("goodput" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["interrupted"]
    assert result["points"][0]["repeats"][0]["valid"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--rate", "fast"], 2, "--rate: expected requests/s such as 20, or 1.5x, got 'fast'"),
        (["--base-url", "localhost"], 2, "--base-url: expected http"),
        (["--extra-body", "[]"], 2, "--extra-body: expected a JSON object, got list"),
        (["--n", "0"], 2, "--n: expected a whole number from 1 to 1000, got '0'"),
        (["--size", "64x64=-1"], 2, "--size: expected a share above 0"),
        (["--tenant", "a=1=NO_SUCH_VARIABLE"], 2, "--tenant: expected"),
        (["--trace", "/nonexistent.jsonl"], 2, "--trace: .*No such file"),
        (["--check", "reference", "--no-seed"], 2, "needs seeds"),
        (
            ["--base-url", "http://127.0.0.1:9/v1"],
            1,
            "expected a picture from http://127.0.0.1:9/.*, got Client",
        ),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", "serve", *arguments]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert re.search(words, told.err.splitlines()[-1])


def test_a_server_that_ignores_the_seed_is_found_out(tmp_path: Path) -> None:
    levels = itertools.count()

    async def drifting(request: web.Request) -> web.Response:
        return web.Response(body=answer(next(levels)))

    async def run() -> subprocess.CompletedProcess[str]:
        async with serving(drifting) as url:
            return await asyncio.to_thread(run_flashbulb, "bench", "serve", "--base-url", url, "--rate", "5")

    done = asyncio.run(run())
    assert done.returncode == 1
    assert "does not follow the seed; use --check decodable" in done.stderr


def departures(offsets: np.ndarray, service_s: float) -> np.ndarray:
    """Lindley's recursion of one server that takes the same time for everybody."""
    done = np.empty(len(offsets))
    free = 0.0
    for row, offset in enumerate(offsets):
        free = done[row] = max(free, offset) + service_s
    return done


def waits_at_most(wait: float, load: float) -> float:
    """P(W <= wait) of M/D/1 with service time 1 (Erlang 1909, Crommelin 1932)."""
    return (1 - load) * math.fsum(
        (load * (k - wait)) ** k / math.factorial(k) * math.exp(-load * (k - wait))
        for k in range(int(wait) + 1)
    )


@pytest.mark.parametrize("load_factor", [0.5, 0.7])
def test_percentiles_are_those_of_a_queue_with_known_service_time(load_factor: float) -> None:
    seconds, service_s = 200_000 / load_factor, 1.0
    offsets = draw_offsets(np.random.default_rng(11), load_factor, seconds)
    run = Run(wall_s=seconds)
    for offset, done in zip(offsets, departures(offsets, service_s), strict=True):
        planned = Planned(float(offset), PICTURE, ANYBODY)
        run.samples.append(Sample(planned, sent_s=float(offset), done_s=float(done), status=200, valid=True))
    told = measure(run, slo=Slo(5000), warm_up_s=0, seconds=seconds, offered=load_factor, trust=Trust())
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        wait = told["latency_ms"][name] / 1000 - service_s
        assert waits_at_most(wait * (1 + PERCENTILE_TOLERANCE), load_factor) >= share
        assert waits_at_most(wait * (1 - PERCENTILE_TOLERANCE), load_factor) <= share or wait == 0
    assert told["attainment"] == pytest.approx(waits_at_most(4.0, load_factor), abs=0.003)
    assert told["invalid"] == []


async def test_no_live_answer_is_timed_before_the_queue_can_have_given_it() -> None:
    """A server that serves one after another in 4 ms: no answer comes before the plan says it can."""
    service_s = 0.004
    free_at = 0.0
    loop = asyncio.get_running_loop()

    async def one_after_another(request: web.Request) -> web.Response:
        nonlocal free_at
        free_at = max(free_at, loop.time()) + service_s
        await asyncio.sleep(free_at - loop.time())
        return web.Response(body=answer(7))

    offsets = draw_offsets(np.random.default_rng(5), 200, 1.0)
    async with serving(one_after_another) as url:
        run = await load(url, list(offsets))
    expected = departures(offsets, service_s)
    measured = np.sort([sample.done_s for sample in run.samples])  # two that meet on the way may swap places
    assert len(measured) == len(offsets) > 150
    assert (measured >= expected - 0.002).all()  # the loop's timer may fire a moment early
    assert (expected - offsets).max() > 3 * service_s  # there was a queue to be seen


def test_a_plot_shows_every_point_and_escapes_its_title() -> None:
    repeat = {"latency_ms": {"p50": 1, "p90": 2, "p99": 40.0, "max": 50}, "mean_batch": None, "errors": {}}
    repeat |= {"achieved_rps": 9.0, "attainment": 1, "on_time_of_answered": 1, "shed": 0, "invalid": []}
    points = [summarise([{**repeat, "offered_rps": rate, "goodput_rps": rate}]) for rate in (10.0, 20.0)]
    root = ElementTree.fromstring(draw_plot("a < b & c", {"x": points, "y": points}))
    circles = [element for element in root if element.tag.endswith("circle")]
    assert len(circles) == 2 * 2 * 2
    assert [nice_ceiling(value) for value in (0.3, 1, 2.2, 26, 99)] == [0.5, 1, 2.5, 50, 100]
