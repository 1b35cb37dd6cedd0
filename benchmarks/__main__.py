"""Run the benchmarks, after the tests of what they measure: no number is printed on red.

python -m benchmarks [--out FOLDER]
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TESTS = ("tests/distill/export", "tests/distill/core", "tests/service/worker/test_onnx_backend.py")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "local")
    args = parser.parse_args()
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=HERE.parent, check=False)
    if tested.returncode:
        print("the tests of what is measured fail: nothing was measured", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    script = HERE / "student_vs_teacher.py"
    command = [sys.executable, str(script), "--out", str(args.out.resolve() / f"{script.stem}.json")]
    return subprocess.run(command, cwd=HERE.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
