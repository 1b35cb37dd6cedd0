"""schemathesis over the whole OpenAPI document: no 5xx, no undocumented status, content type or body.

    python -m benchmarks fuzz [--examples 200] [--seed 1] [--url http://127.0.0.1:8000] [--write]

Without --url a server of its own is started. 200 examples per operation are about 5,000 cases. The verdict is good
when every case passed, and there were at least 2,000 of them (or as many as --least says).
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import rig

NAME = "fuzz"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.arguments(__doc__)
    parser.add_argument("--examples", type=int, default=200, help="random ones of each operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--least", type=int, default=2000, help="cases that there must be")
    parser.add_argument("--url", help="a server that runs, instead of one of its own")
    args = parser.parse_args(argv)
    if args.url:
        result = fuzz(args.url, args.examples, args.seed, args.least)
    else:
        with rig.serving(args.bundle, threads=args.threads) as server:
            result = fuzz(server.url, args.examples, args.seed, args.least)
    rig.finish(NAME, result, write=args.write)
    return 0 if result["verdict"]["good"] else 1


def fuzz(url: str, examples: int, seed: int, least: int) -> dict[str, Any]:
    """Run schemathesis, and read its summary."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", str(examples)),
        *("--seed", str(seed), "--generation-database", "none", "--workers", "1", "--request-timeout", "20"),
    ]
    with tempfile.TemporaryDirectory() as folder:  # where it leaves its files
        run = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (generated|passed|failed)", run.stdout)}
    operations = re.search(r"Operations:\s+(\d+) selected / (\d+) total", run.stdout)
    verdict = {
        "all_passed": run.returncode == 0 and counts.get("passed") == counts.get("generated"),
        "enough_cases": counts.get("generated", 0) >= least,
        "whole_document": operations is not None and operations[1] == operations[2],
    }
    if not verdict["all_passed"]:
        rig.say(run.stdout[-6000:] + run.stderr[-2000:])
    return {
        "verdict": {"good": all(verdict.values()), **verdict},
        "checks": CHECKS.split(","),
        "operations": int(operations[1]) if operations else 0,
        "cases": counts,
        "examples": examples,
        "seed": seed,
    }


if __name__ == "__main__":
    sys.exit(main())
