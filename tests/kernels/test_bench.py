"""`flashbulb kernels verify` and `bench`: what they refuse, and that no time is taken on wrong kernels."""

import json
import time

import pytest
import torch

from flashbulb_kernels import bench, verify
from flashbulb_kernels.bench import Layer
from flashbulb_service.cli import run as flashbulb

TINY = [
    Layer("sdxl", "cross", 2, 40, 17, d=32),
    Layer("sd35", "joint", 2, 40, 40, d=32, text=9, norm="rms"),
    Layer("cogvideox", "joint", 2, 40, 40, d=32, text=9, norm="layer", rotary=True),
]
FEW = [verify.Case(7, 9, 32, torch.bfloat16)]


def wall_clock(function):
    started = time.perf_counter()
    function()
    elapsed = 1000 * (time.perf_counter() - started)
    return elapsed, elapsed, elapsed


@pytest.fixture
def with_a_gpu(monkeypatch, device):
    """Let the command run on the device of the tests, on tiny layers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "LAYERS", TINY)
    monkeypatch.setattr(bench, "gpu_timer", wall_clock)
    monkeypatch.setattr(verify, "cases", lambda *_: FEW)
    monkeypatch.setattr("flashbulb_kernels.cli.GPU", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_without_a_gpu_says_so_in_one_line(capsys):
    assert flashbulb(["kernels", "bench"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "expected a CUDA device to measure on, found none" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--dtype", "fp8"], "expected one of fp16, bf16, fp32, got 'fp8'"),
        (["bench", "--family", "sdxl,flux"], "expected some of sdxl, sd3, sd35, cogvideox, got 'flux'"),
        (["verify", "--dtype", "x"], "got 'x'"),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, words):
    assert flashbulb(["kernels", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_bench_writes_a_table_and_a_file(with_a_gpu, capsys, tmp_path):
    out = tmp_path / "times.json"
    assert flashbulb(["kernels", "bench", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "kernels: 1 cases right" in told.err
    listed = [line.split()[0] for line in told.out.splitlines()]
    assert listed == ["family", "sdxl", "sdxl", "sd35", "sd35", "cogvideox", "cogvideox"]
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * len(TINY)
    for row in rows:
        assert row["speedup"] == pytest.approx(row["torch_ms"][0] / row["ours_ms"][0])
        assert min(*row["ours_ms"], *row["torch_ms"]) > 0


def test_no_time_is_taken_on_wrong_kernels(with_a_gpu, monkeypatch, capsys):
    from flashbulb_kernels.attention import forward

    right = forward.forward
    monkeypatch.setattr(forward, "forward", lambda *a: tuple(2 * x for x in right(*a)))
    monkeypatch.setattr(bench, "gpu_timer", lambda function: pytest.fail("a time was taken"))
    assert flashbulb(["kernels", "bench"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "got 1 wrong ones, the first: 7x9 d32 bfloat16" in told.err


@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.family)
def test_both_sides_compute_the_same(device, layer):
    """A comparison of times means nothing otherwise."""
    q, k, v = bench._draw(layer, 2, torch.float32, torch.device(device))
    preparation = bench._preparation(layer, torch.float32, torch.device(device))
    ours, theirs = (run(q, k, v, preparation, layer) for run in (bench.by_triton, bench.by_torch))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_work_is_counted_by_the_matrix_products():
    """Forward: two products of 2 * n * m * d each; training: five more. By hand for n = 40, m = 17, d = 32, 2 heads."""
    rows = list(
        bench.bench(
            TINY[:1],
            batch=3,
            dtype=torch.float32,
            device=torch.device("cpu"),
            timer=lambda _: (2.0, 1.0, 3.0),
        )
    )
    assert [row.work for row in rows] == ["forward", "training"]
    assert rows[0].tflops == pytest.approx(2 * 2 * 3 * 2 * 40 * 17 * 32 / 2e-3 / 1e12)
    assert rows[1].tflops == pytest.approx(3.5 * rows[0].tflops)
    assert rows[0].speedup == 1.0


def test_training_is_timed_only_where_there_are_kernels_for_gradients(monkeypatch, device):
    monkeypatch.setattr(bench, "arch_of", lambda _: "sm_90")
    for dtype, works in ((torch.float32, ["forward"]), (torch.bfloat16, ["forward", "training"])):
        rows = bench.bench(
            TINY[:1], batch=1, dtype=dtype, device=torch.device(device), timer=lambda _: (2.0, 1.0, 3.0)
        )
        assert [row.work for row in rows] == works


def test_verify_lists_every_case(monkeypatch, device, capsys):
    monkeypatch.setattr(verify, "cases", lambda *_: FEW)
    assert flashbulb(["kernels", "verify"]) == 0
    assert capsys.readouterr().out.startswith("ok    7x9 d32 bfloat16: ")
