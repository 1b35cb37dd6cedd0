"""schemathesis over the whole OpenAPI document: no 5xx, no undocumented status, content type or body.

FUZZ_EXAMPLES=200 pytest tests/service/api/test_fuzz.py -s --timeout 1200   # thousands of cases
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fuzzed_requests_get_documented_answers_only(server_url: str, tmp_path: Path) -> None:
    examples = os.environ.get("FUZZ_EXAMPLES", "5")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server_url}/openapi.json"),
        *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", examples),
        *("--seed", "1", "--generation-database", "none", "--workers", "1", "--request-timeout", "20"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    print(run.stdout[-6000:], run.stderr[-2000:])
    assert run.returncode == 0, run.stdout[-3000:]
    cases = re.search(r"([0-9]+) generated", run.stdout)
    assert cases is not None and int(cases[1]) > 100
