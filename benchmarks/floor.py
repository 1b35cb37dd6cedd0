"""What servers add to a picture at light load that do less than Flashbulb: what of its overhead is its arrangement.

    python -m benchmarks floor [--requests 100] [--turns 3] [--pause-ms 50] [--write]

By turns, each measured as `overhead` does it: Flashbulb; the least of three processes (`three_processes`: an API,
a Valkey that writes a log, a worker that is a loop; a job is stored, claimed and committed, and there is no admission,
no deadline, tenant, batch, cancelling, trace or metric); and one process that keeps nothing (`peers/fastapi_app.py`).
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import rig
from overhead import WARM_UP, measure
from peers import answers, free_port, stop
from student import open_as_worker

from flashbulb_service.embedded import EmbeddedServer

NAME = "floor"
HERE = Path(__file__).resolve().parent
FLASHBULB, THREE, ONE = "Flashbulb", "the least of three processes", "one process that keeps nothing"


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--requests", type=int, default=100, help="a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--pause-ms", type=float, default=50.0)
    args = parser.parse_args(argv)
    student = open_as_worker(args.bundle, threads=args.threads, batch=1)
    overhead_ms: dict[str, list[float]] = {name: [] for name in (FLASHBULB, THREE, ONE)}
    wrong = 0
    with ExitStack() as stack:
        urls = {
            FLASHBULB: stack.enter_context(rig.serving(args.bundle, threads=args.threads)).url,
            THREE: stack.enter_context(three_processes(args.bundle, args.threads)),
            ONE: stack.enter_context(one_process(args.bundle, args.threads)),
        }
        for turn in range(args.turns):
            for name, url in urls.items():
                rig.say(f"{name}, {turn + 1} of {args.turns}")
                first = turn * (WARM_UP + args.requests)  # of a prompt seen before the embedding is known
                told = measure(url, student, args.requests, args.pause_ms / 1000, first=first)
                overhead_ms[name].append(round(told["overhead_ms"]["p50"], 2))
                wrong += told["wrong"]
    result = {
        "overhead_p50_ms": {
            name: {"turns": turns, "median": statistics.median(turns)} for name, turns in overhead_ms.items()
        },
        "requests": args.requests,
        "threads": args.threads,
        "pause_ms": args.pause_ms,
        "wrong": wrong,
    }
    rig.finish(NAME, result, write=args.write)
    return 1 if wrong else 0


@contextmanager
def three_processes(bundle: Path, threads: int) -> Iterator[str]:
    """Run the least server of three processes while this is open."""
    apps = HERE / "three_processes"
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "results").mkdir()
        queue = stack.enter_context(EmbeddedServer(folder / "data")).url
        started = _start(stack, apps / "worker.py", queue, bundle, folder / "results", threads)
        assert started.stdout is not None
        if started.stdout.readline() != b"ready\n":
            raise SystemExit("the worker did not start")
        port = free_port()
        yield _answering(_start(stack, apps / "api.py", queue, port), port)


@contextmanager
def one_process(bundle: Path, threads: int) -> Iterator[str]:
    """Run FastAPI around the student while this is open."""
    port = free_port()
    options = ["--bundle", bundle, "--port", port, "--threads", threads]
    with ExitStack() as stack:
        yield _answering(_start(stack, HERE / "peers" / "fastapi_app.py", *options), port)


def _start(stack: ExitStack, app: Path, *arguments: object) -> "subprocess.Popen[bytes]":
    environment = rig.clean_environment()
    environment["PYTHONPATH"] += f":{HERE}:{app.parent}"
    command = [sys.executable, str(app), *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    stack.callback(stop, process)
    return process


def _answering(process: "subprocess.Popen[bytes]", port: int) -> str:
    url = f"http://127.0.0.1:{port}"
    if not rig.run(lambda: answers(url, process))["ready"]:
        raise SystemExit(f"{process.args} did not start")
    return url


if __name__ == "__main__":
    sys.exit(main())
