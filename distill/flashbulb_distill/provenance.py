"""Say which code made something."""

import subprocess
from pathlib import Path


def code_version() -> str:
    """Return the commit that this code was run from, "-dirty" if it was changed; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
