"""What the benchmarks of the service share: the whole server as processes, their CPU time and memory, results."""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import uvloop

from flashbulb_service.bench.session import machine
from flashbulb_service.bench.workload import COLOURS, SUBJECTS, Picture

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
COMMIT = subprocess.run(  # when the run starts: the checkout may move on before it ends
    ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.strip()


class Server:
    """`flashbulb serve` in a folder of its own, with the process ids of its parts."""

    def __init__(
        self, folder: Path, models: Path, *, threads: int, settings: Mapping[str, str], workers: int = 1
    ) -> None:
        self.data = folder / "data"
        self._log = (folder / "server.log").open("wb")
        env = clean_environment()
        env |= {f"FLASHBULB_{name.upper()}": value for name, value in settings.items()}
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "flashbulb_service.cli", "serve", "--models", models),
                *("--data", self.data, "--port", "0", "--workers", str(workers), "--threads", str(threads)),
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )
        assert self.process.stdout is not None
        found = None
        for line in self.process.stdout:
            found = re.search(r"ready: (http://\S+)", line)
            if found:
                break
        if found is None:
            raise SystemExit(f"the server did not start: {(folder / 'server.log').read_text()[-2000:]}")
        self.url = found[1]

    def pids(self) -> dict[str, int]:
        """Return the process ids by part."""
        parts = {"api": self.process.pid}
        for pid in children(self.process.pid):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            parts["worker" if b"flashbulb_service.cli" in command else "valkey"] = pid
        return parts

    def queue_url(self) -> str:
        """Return the address of the embedded Valkey; it holds a password."""
        return str(json.loads((self.data / "queue" / "server.json").read_text())["url"])

    def stop(self) -> None:
        """Stop the server and wait for it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


def repository_of(folder: Path, bundle: Path) -> Path:
    """Make a model repository of one bundle alone, and return it."""
    models = folder / bundle.parent.name
    models.mkdir(parents=True)
    (models / bundle.name).symlink_to(bundle.resolve(), target_is_directory=True)
    return folder


@contextmanager
def serving(bundle: Path, *, threads: int, workers: int = 1, **settings: str) -> Iterator[Server]:
    """Serve one bundle while this is open."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(
            folder,
            repository_of(folder / "models", bundle),
            threads=threads,
            settings=settings,
            workers=workers,
        )
        try:
            yield server
        finally:
            server.stop()


def clean_environment(code: Path = ROOT) -> dict[str, str]:
    """Return this process's environment without settings of ours, for the packages of a checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLASHBULB_")}
    folders = [str(code / part) for part in ("service", "distill", "kernels")]
    return kept | {"PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("MARKS")]), *folders])}


def drain(stream: IO[str]) -> None:
    """Read a pipe to its end in the background, so that its writer never waits."""
    threading.Thread(target=lambda: [None for _ in stream], daemon=True).start()


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for listed in lists for child in listed.read_text().split()]


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used, its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def anonymous_mb(pid: int) -> float:
    """Return the memory that is a process's own: no pages of files, which the system may take back at any time."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def different_pictures(count: int, *, first: int = 0) -> list[Picture]:
    """Return requests of which no two share a prompt: no cache of prompts helps anybody."""
    return [
        Picture(f"{COLOURS[number % len(COLOURS)]} {SUBJECTS[number % len(SUBJECTS)]} {number}", number)
        for number in range(first, first + count)
    ]


def plain_arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/<name>.json")
    return parser


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of the benchmarks that serve a bundle."""
    parser = plain_arguments(doc)
    parser.add_argument("--bundle", type=Path, default=ROOT / "models" / "emoji" / "1")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime, on both sides")
    return parser


def run(work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """Run a coroutine on uvloop."""

    async def main() -> dict[str, Any]:
        return await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def say(line: str) -> None:
    """Report progress."""
    print(line, file=sys.stderr, flush=True)


def finish(name: str, result: dict[str, Any], *, write: bool, out: Path | None = None) -> None:
    """Print a result with the machine and commit that gave it; keep it, or write it to `out`, if asked to."""
    text = json.dumps({**result, "machine": machine(), "commit": COMMIT}, indent=2)
    print(text)
    for file in [*([RESULTS / f"{name}.json"] if write else []), *([out] if out else [])]:
        file.write_text(text + "\n", encoding="utf-8")
