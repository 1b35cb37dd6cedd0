"""Two processes that share a network's blocks (FSDP2, gloo) train as one process does, and hand over to one another."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashbulb_distill.ranks import ALONE
from flashbulb_distill.train.checkpoint import checkpoints
from flashbulb_distill.train.recipe import RecipeError, load_recipe
from support import sharded_run
from support.sharded_run import ADAPTERS, HALF, STEPS, run
from support.tiny_teacher import make_tiny_teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
TESTS = Path(__file__).resolve().parents[2]
# Sums are taken in another order, and Adam divides by small second moments. Measured: 8e-8, heads 2e-5.
TOLERANCES = {"average/": 1e-6, "module/student/": 1e-6, "module/fake/": 1e-6, "module/latent/": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folders of runs by one process and by two: see support.sharded_run."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.set_num_threads(1)
    tiny = make_tiny_teacher(folder / "teacher")
    run(tiny, folder / "alone", steps=HALF)
    shutil.copytree(folder / "alone", folder / "together")
    run(tiny, folder / "alone")
    run(tiny, folder / "adapters-alone", ALONE, *ADAPTERS, steps=HALF)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command += ["-m", "support.sharded_run", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    run(tiny, folder / "apart")
    return folder


def newest(folder):
    return load_file(checkpoints(folder)[0])


def largest_difference(one, other, prefix):
    return max(float((one[name] - other[name]).abs().max()) for name in one if name.startswith(prefix))


def scalars(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("alone", "shared"),
    [
        ("alone", "unbroken"),
        ("alone", "together"),  # began alone, went on shared out
        ("apart", "unbroken"),  # began shared out, went on alone
        ("adapters-alone", "adapters"),  # on one shared-out backbone
    ],
)
def test_ranks_that_share_the_weights_go_where_one_process_goes(folder, alone, shared):
    one, other = newest(folder / alone), newest(folder / shared)
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one), "a checkpoint holds whole tensors"
    for prefix, tolerance in TOLERANCES.items():
        assert largest_difference(one, other, prefix) < tolerance, prefix


def test_the_comparison_sees_one_step_more(folder):
    """The tolerance is far below what a step moves: a run that stopped early is told from one that did not."""
    begun = load_file(checkpoints(folder / "alone")[1])
    for prefix, tolerance in TOLERANCES.items():
        assert largest_difference(begun, newest(folder / "unbroken"), prefix) > 10 * tolerance, prefix


def test_a_shared_run_that_is_broken_off_ends_bitwise_where_the_unbroken_one_does(folder):
    one, other = newest(folder / "unbroken"), newest(folder / "broken")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert scalars(folder / "unbroken") == scalars(folder / "broken")


def test_norms_and_losses_are_those_of_one_process(folder):
    for one, two in zip(scalars(folder / "alone"), scalars(folder / "unbroken"), strict=True):
        assert one.keys() == two.keys()
        for name in one:  # a bin of times holds other numbers of rows in each process: means of means differ
            if not name.startswith(("accuracy", "saturation", "stage")):
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


def test_each_rank_holds_its_share_of_the_blocks_and_every_loss_still_moves_its_own_role_alone(folder):
    found = report(folder)["unbroken"]
    # Two blocks are three fifths of the tiny network; the embeddings stay whole.
    assert found["shared"] == {
        "student": pytest.approx(0.70, abs=0.01),
        "fake": pytest.approx(0.70, abs=0.01),
        "latent": 1.0,
    }
    assert found["shared_teacher"] == pytest.approx(0.70, abs=0.01)
    assert found["teacher_is_unmoved"]
    assert found["gradients_left"] == 0
    assert found["whole_averages"]
    assert found["moved_at_first"] == ["fake", "latent"], "during the warm-up the student stands"


def test_adapters_stay_whole_and_their_backbone_is_shared_out(folder):
    found = report(folder)["adapters"]
    assert set(found["shared"].values()) == {1.0}
    assert found["shared_teacher"] < 0.71
    assert found["teacher_is_unmoved"]


def test_the_guard_sees_the_samples_of_all_ranks(folder):
    looks = [
        json.loads((folder / name / "guard.json").read_text())["looks"] for name in ("alone", "unbroken")
    ]
    assert [look["step"] for look in looks[0]] == [0, HALF, STEPS]
    for one, two in zip(*looks, strict=True):
        for name in ("colour_drift", "contrast", "diversity"):
            assert two["figures"][name] == pytest.approx(one["figures"][name], rel=1e-4), name


def test_eight_bit_moments_cannot_be_shared_out():
    with pytest.raises(RecipeError, match="expected optimizer adamw beside fsdp, got adamw8bit"):
        load_recipe(sharded_run.RECIPE, ["memory.sharding=fsdp", "memory.optimizer=adamw8bit"])
