"""Draw a picture with Valkey, API and worker, each a process of a built image: images_test.py FOLDER.

Called by .ci/images. Valkey's program is the one in the worker image. Everything listens on loopback.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

WORK = Path(sys.argv[1])
READY_S = 180.0


def buildah(*args: str) -> str:
    """Run buildah on the store that .ci/images filled; return its output."""
    command = ["buildah", "--root", str(WORK / "storage"), "--runroot", str(WORK / "run"), *args]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def start(container: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
    """Run a command in a container as the image's user; /shared is everybody's, as the image's own volumes are not."""
    options = [f"--env={name}={value}" for name, value in environment.items()]
    return subprocess.Popen(
        ["buildah", "--root", str(WORK / "storage"), "--runroot", str(WORK / "run"), "run",
         "--isolation", "chroot", "--user", "10001:10001", "--volume", f"{WORK / 'shared'}:/shared", *options,
         container, "--", *command],
        start_new_session=True,
    )  # fmt: skip


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Start the three, wait for readiness, draw the same picture twice and compare."""
    shared = WORK / "shared"
    shared.mkdir(exist_ok=True)
    os.chown(shared, 10001, 10001)
    api = buildah("from", "--pull-never", "flashbulb-api")
    worker = buildah("from", "--pull-never", "flashbulb-worker")
    port, redis_port, password = free_port(), free_port(), secrets.token_hex(16)
    settings = {
        "FLASHBULB_REDIS": f"redis://:{password}@127.0.0.1:{redis_port}/0",
        "FLASHBULB_RESULTS_URL": "file:///shared/results",
    }
    processes = []
    try:
        server = buildah(
            "run", "--isolation", "chroot", worker, "--", "/opt/flashbulb/bin/python", "-c",
            "from flashbulb_service.embedded import find_server; print(find_server())",
        )  # fmt: skip
        processes.append(
            start(worker, server, "--port", str(redis_port), "--bind", "127.0.0.1", "--requirepass", password,
                  "--dir", "/shared", "--appendonly", "yes")
        )  # fmt: skip
        processes.append(start(worker, "flashbulb", "worker", **settings))
        processes.append(
            start(api, "flashbulb", "api", "--host", "127.0.0.1", "--port", str(port), **settings)
        )
        wait_ready(f"http://127.0.0.1:{port}/readyz", processes)
        first, second = draw(port), draw(port)
        assert first == second, "expected equal bytes for equal seeds"
        assert first.startswith("iVBORw0KGgo"), "expected a PNG"
    finally:
        print("images: stopping; buildah reports each process that is told to end as an error", flush=True)
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        buildah("rm", api, worker)
    print(f"images: drew a picture of {len(first) * 3 // 4} bytes with processes from the built images")


def wait_ready(url: str, processes: list[subprocess.Popen[bytes]]) -> None:
    """Return when the address answers 200."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).read()
            return
        except OSError:
            if any(process.poll() is not None for process in processes):
                sys.exit("images: a process ended before the service was ready")
            if time.monotonic() > deadline:
                sys.exit(f"images: expected {url} to answer within {READY_S:g} s")
            time.sleep(0.5)


def draw(port: int) -> str:
    """Return a picture as base64."""
    body = json.dumps({"prompt": "red apple", "seed": 7}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/images/generations", body, {"content-type": "application/json"}
    )
    try:
        answer = json.load(urllib.request.urlopen(request, timeout=60))
    except urllib.error.HTTPError as error:
        sys.exit(f"images: expected a picture, got {error.code}: {error.read().decode()[:500]}")
    return str(answer["data"][0]["b64_json"])


if __name__ == "__main__":
    main()
