"""Command blocks that a document marks as runnable are run, as they stand, where a reader would."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- runnable -->\s*```sh\n(.*?)```", re.DOTALL)


def blocks() -> Iterator[tuple[str, str]]:
    """Yield (document and number, commands) of every block that is marked."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
    for document in documents:
        for number, text in enumerate(BLOCK.findall(document.read_text(encoding="utf-8"))):
            yield f"{document.relative_to(ROOT)}-{number}", text


def run(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run commands in a folder that has the models, with flashbulb on the path, stopping at the first failure."""
    (folder / "models").symlink_to(ROOT / "models")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {n: v for n, v in os.environ.items() if not n.startswith("FLASHBULB_")}
    return subprocess.run(
        ["sh", "-eu"],
        input=commands,
        cwd=folder,
        env={**environment, "PATH": path, "XDG_STATE_HOME": str(folder / "state")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_are_blocks() -> None:
    assert len(list(blocks())) >= 2


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("commands", [pytest.param(text, id=name) for name, text in blocks()])
def test_block_runs(commands: str, tmp_path: Path) -> None:
    done = run(commands, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_planted_failing_command_is_found(tmp_path: Path) -> None:
    assert run("flashbulb models list\nflashbulb models inspect unicorn\ntrue", tmp_path).returncode != 0
