"""A few examples of every operation; the long form: python -m benchmarks fuzz"""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[3] / "benchmarks" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fuzzed_requests_get_documented_answers_only(server_url: str) -> None:
    run = subprocess.run(
        [sys.executable, FUZZ, "--url", server_url, "--examples", "5", "--least", "100"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
