"""The script for SLURM: what is stopped goes on where it was, what fails for good is not queued for ever.

SLURM's commands are stand-ins here: `srun` runs its command on this machine, `scontrol` writes down what it is told.
Training is real (the mixture), under the real torchrun.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "training" / "slurm.sh"
SRUN = """#!/bin/sh
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
shift
echo $$ >"$STANDIN/srun.pid"
exec "$@"
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) echo localhost ;;
  requeue) echo "$2" >>"$STANDIN/requeued" ;;
  *) exit 99 ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return what starts the script as SLURM would, with a program in the place of flashbulb."""
    programs = tmp_path / "bin"
    programs.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        job = 10000 + probe.getsockname()[1] % 10000

    def start(flashbulb: str, out: Path) -> subprocess.Popen[str]:
        torchrun = f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
        for name, text in {
            "srun": SRUN,
            "scontrol": SCONTROL,
            "torchrun": torchrun,
            "flashbulb": flashbulb,
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]),
            "STANDIN": str(tmp_path),
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": "node[1]",
            "SLURM_NNODES": "1",
            "SLURM_GPUS_ON_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = ["bash", SCRIPT, "recipe.yaml", out]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    return start


def distil(*options: str) -> str:
    """Return a stand-in for `flashbulb distill run RECIPE --out FOLDER --resume` that trains on the mixture."""
    return f"""#!/bin/sh
[ "$1 $2 $4 $6" = "distill run --out --resume" ] || exit 99
exec {sys.executable} -m support.mixture_run "$5" {" ".join(options)}
"""


def rows(out: Path) -> list[dict[str, float]]:
    """Return what was logged of training, without the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_is_told_to_stop_is_queued_again_and_goes_on_to_the_same_end(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    whole, out, requeued = tmp_path / "whole", tmp_path / "out", tmp_path / "requeued"
    done = slurm(distil(), whole)
    _, told = done.communicate()
    assert done.returncode == 0, told
    assert not requeued.exists()

    # As before the end of the job's time: the signal goes to what srun started, and not to the script.
    stopped = slurm(distil("--wait-at", "9"), out)
    while not (out / "waiting").exists():
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.05)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    _, told = stopped.communicate()
    assert stopped.returncode != 0
    assert "queued again" in told
    assert len(requeued.read_text().split()) == 1
    assert 0 < rows(out)[-1]["step"] < rows(whole)[-1]["step"]

    again = slurm(distil(), out)
    _, told = again.communicate()
    assert again.returncode == 0, told
    assert len(requeued.read_text().split()) == 1
    assert rows(out) == rows(whole)
    assert not list(out.glob(".started-*"))


@pytest.mark.timeout(120)
def test_a_job_that_fails_without_a_new_checkpoint_stays_failed(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "step-5.safetensors").write_bytes(b"of an earlier attempt")
    os.utime(out / "step-5.safetensors", (1, 1))
    failed = slurm("#!/bin/sh\nexit 7\n", out)
    _, told = failed.communicate()
    assert failed.returncode != 0
    assert "queued again" not in told
    assert not (tmp_path / "requeued").exists()
