"""Run a benchmark, after the tests of what it measures: no number is printed on red.

    python -m benchmarks NAME [options]          NAME --help tells its options

student     model time of one picture, student beside teacher (the default)
saturate    pictures/s of the whole server beside a bare onnxruntime loop
overhead    what the server adds to a picture at light load
floor       the same of servers that do less: the least of three processes, and one process
stages      where that time goes, by the stages of API and worker
decide      a decision and a claim with a thousand requests waiting
durability  what `appendfsync always` of a Valkey of your own costs beside `everysec`
capacity    workers and p99 that `flashbulb plan-capacity` predicts, beside what `bench serve` measures
live        goodput of the server on a synthetic device, beside the simulation
mixed       p99 of pictures at half of the capacity, without and beside videos back to back
chaos       2,000 jobs while workers, APIs and Valkey are killed: lost, doubled, different
fuzz        thousands of requests drawn from the OpenAPI document
soak        random cancels and disconnects: memory, queue and keys at the end
rolling     a restart of every part under load, from one version to another
runtimes    the student on its bundle beside bare onnxruntime, eager torch and torch.compile
plans       memory and time of the large recipes on several GPUs, as `flashbulb distill plan` predicts them
step_budget  one iteration of ADM beside its own forward and backward passes
memory      peak memory of exporting a large network, beside the bytes of its weights
peers       Flashbulb beside FastAPI, LitServe and Ray Serve around the same student
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVICE_TESTS = (
    "tests/service/bench/test_load.py",
    "tests/service/worker",
    "tests/service/cli/test_serve.py",
)
BENCHMARKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "student": (
        "student_vs_teacher.py",
        ("tests/distill/export", "tests/distill/core", "tests/service/worker/test_onnx_backend.py"),
    ),
    "saturate": ("saturate.py", SERVICE_TESTS),
    "overhead": ("overhead.py", SERVICE_TESTS),
    "floor": ("floor.py", SERVICE_TESTS),
    "stages": ("stages.py", SERVICE_TESTS),
    "decide": ("decide.py", ("tests/service/queue", "tests/service/test_scheduler.py")),
    "durability": ("durability.py", ("tests/service/queue", "tests/deploy/test_compose.py")),
    "capacity": ("capacity.py", ("tests/service/test_capacity.py", "tests/service/test_simulate.py")),
    "live": ("live.py", (*SERVICE_TESTS, "tests/service/test_simulate.py")),
    "mixed": ("mixed.py", ("tests/service/video", "tests/service/test_turns.py")),
    "chaos": ("chaos.py", ("tests/service/chaos", "tests/service/queue")),
    "fuzz": ("fuzz.py", ("tests/service/api/test_errors.py", "tests/service/api/test_fuzz.py")),
    "soak": ("soak.py", SERVICE_TESTS),
    "rolling": (
        "rolling.py",
        ("tests/service/test_wire.py", "tests/service/queue", "tests/service/worker/test_kill.py"),
    ),
    "runtimes": (
        "runtimes.py",
        ("tests/distill/export/test_verify.py", "tests/service/worker/test_onnx_backend.py"),
    ),
    "plans": ("plans.py", ("tests/distill/plan",)),
    "step_budget": ("step_budget.py", ("tests/distill/train/test_adm.py",)),
    "memory": ("export_memory.py", ("tests/distill/export/test_pipeline.py",)),
    "peers": ("peers.py", SERVICE_TESTS),
}


def main(argv: list[str]) -> int:
    name, options = (argv[0], argv[1:]) if argv and argv[0] in BENCHMARKS else ("student", argv)
    if argv and argv[0] not in BENCHMARKS and (not argv[0].startswith("-") or argv[0] in ("-h", "--help")):
        print(__doc__)
        return 0 if argv[0].startswith("-") else 2
    script, tests = BENCHMARKS[name]
    if "--help" not in options and "-h" not in options:
        tested = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=HERE.parent, check=False)
        if tested.returncode:
            print("the tests of what is measured fail: nothing was measured", file=sys.stderr)
            return 1
    if name == "student":
        options = _student_options(options)
    return subprocess.run(
        [sys.executable, str(HERE / script), *options], cwd=HERE.parent, check=False
    ).returncode


def _student_options(options: list[str]) -> list[str]:
    """Keep `--out FOLDER` of this command: the script itself takes a file."""
    if "--out" in options and options.index("--out") + 1 < len(options):
        at = options.index("--out")
        folder = Path(options[at + 1]).resolve()
        options = [*options[:at], *options[at + 2 :]]
    else:
        folder = HERE / "results" / "local"
    folder.mkdir(parents=True, exist_ok=True)
    return [*options, "--out", str(folder / "student_vs_teacher.json")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
