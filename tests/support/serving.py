"""Flashbulb as real processes, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

FLASHBULB = [sys.executable, "-m", "flashbulb_service.cli"]


def clean_env(**settings: str) -> dict[str, str]:
    """This process's environment without settings of ours, plus the given FLASHBULB_ ones."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLASHBULB_")}
    return env | {f"FLASHBULB_{name.upper()}": value for name, value in settings.items()}


def run_flashbulb(*arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*FLASHBULB, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_env(**settings),
        check=False,
    )


class Serving:
    """`flashbulb serve` on a free port, from its ready line to its end."""

    def __init__(self, models: Path, data: Path, *arguments: str, **settings: str) -> None:
        self.data = data
        self._log = (data.parent / f"{data.name}.log").open("ab")
        self.process = subprocess.Popen(
            [*FLASHBULB, "serve", "--models", models, "--data", data, "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=clean_env(threads="1", **settings),
        )
        self.url = self._ready_address()

    def _ready_address(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"ready: (http://\S+)", line)
            if found:
                return found[1]
        raise AssertionError(f"serve ended with {self.process.wait()}: {Path(self._log.name).read_text()}")

    def children(self) -> list[int]:
        """Process ids of the worker and of Valkey."""
        ids = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for file in ids for pid in file.read_text().split()]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.end()
