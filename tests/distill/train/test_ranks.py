"""Several processes are one run; a killed run is an unbroken one; devices that are not there are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashbulb_distill.ranks import Ranks, joined, own_device
from flashbulb_distill.train.checkpoint import checkpoints

TESTS = Path(__file__).resolve().parents[2]
# Sums over two processes are taken in another order; Adam divides by small second moments. Measured: 3e-6.
TOLERANCE = 5e-5


def run(folder: Path, *options: str, processes: int = 1) -> int:
    """Train on the mixture and return the exit code."""
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [*launcher, "support.mixture_run", str(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    if done.returncode > 0:
        raise AssertionError(done.stderr[-3000:])
    return done.returncode


def scalars(folder: Path) -> list[dict[str, float]]:
    """Return what was logged, without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run by one process, unbroken."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return folder


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_run_killed_at_any_moment_ends_bitwise_where_the_unbroken_one_does(
    whole: Path, tmp_path: Path
) -> None:
    for step in (6, 15):
        assert run(tmp_path, "--kill-at", str(step)) == -9
    assert run(tmp_path) == 0
    a, b = (load_file(checkpoints(folder)[0]) for folder in (whole, tmp_path))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), "weights, optimiser states and averages"
    assert scalars(tmp_path) == scalars(whole)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_see_the_draws_of_one_and_go_the_same_way(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, processes=2) == 0
    assert json.loads((tmp_path / "ranks.json").read_text()) == 2
    # Each pair depends on its draws alone, so equal files are equal draws.
    for path in sorted((whole / "pairs").iterdir()):
        assert (tmp_path / "pairs" / path.name).read_bytes() == path.read_bytes(), path.name
    a, b = (load_file(checkpoints(folder)[0]) for folder in (whole, tmp_path))
    assert a.keys() == b.keys()
    moved = [name for name in a if name.startswith("module/")]
    for name in moved:
        torch.testing.assert_close(a[name], b[name], atol=TOLERANCE, rtol=0)
    for one, two in zip(scalars(whole), scalars(tmp_path), strict=True):
        assert one.keys() == two.keys()
        for name in one:  # a bin of times holds other numbers of rows in each process: means of means differ
            if not name.startswith(("accuracy", "saturation", "stage")):
                assert two[name] == pytest.approx(one[name], abs=1e-3), name


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_one_process_goes_on_where_two_were(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"SIGKILL|exitcode"):
        run(tmp_path, "--kill-at", "15", processes=2)
    assert run(tmp_path) == 0
    a, b = (load_file(checkpoints(folder)[0]) for folder in (whole, tmp_path))
    for name in (name for name in a if name.startswith("module/")):
        torch.testing.assert_close(a[name], b[name], atol=TOLERANCE, rtol=0)


def test_shares_are_disjoint_equal_and_whole_also_of_the_first_rows() -> None:
    shares = [Ranks(index, 4).rows(16) for index in range(4)]
    assert sorted(row for share in shares for row in share) == list(range(16))
    assert [sum(row < 8 for row in share) for share in shares] == [2, 2, 2, 2]


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="3 processes can share equally, got 16"):
        Ranks(0, 3).rows(16)


def test_half_an_environment_of_torchrun_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="without RANK, MASTER_ADDR, MASTER_PORT"),
        joined(torch.device("cpu"), {"WORLD_SIZE": "2"}),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [("cuda", "this torch finds none; use --device cpu"), ("tpu", "expected auto, cpu, cuda")],
)
def test_a_device_that_is_not_there_is_named(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        own_device(name)
    assert own_device("auto") == torch.device("cpu")
