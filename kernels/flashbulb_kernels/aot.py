"""Compile the kernels for GPUs that are not there: PTX and cubin per variant, kept in a cache by content.

A variant is an entry in one form (with a mask, with a norm ...), for a dtype, a head dimension and an architecture.
Triton compiles in worker processes of its own (`aot_worker`), since TRITON_INTERPRET must be unset before it is
imported there and may be set here. This module imports neither Triton nor torch.
"""

import contextlib
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import CompilationFailed, KernelUnavailable
from .signatures import ENTRIES
from .tiles import HEAD_DIMS, Tile, has_tile, tile_for

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
DTYPES = ("fp16", "bf16", "fp32")

# Every kernel in the forms that models ask for: the compile-time flags of a launch. SD3.5 normalises text and image
# with weights of their own; CogVideoX normalises both alike and rotates the image.
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "forward": {"plain": {}, "mask": {"HAS_MASK": True}},
    "fused": {
        "rms": {"NORM": "rms", "SPLIT": True},
        "layer-rope": {"NORM": "layer", "HAS_ROPE": True},
    },
    "delta": {"plain": {}},
    "dkdv": {"plain": {}, "mask": {"HAS_MASK": True}},
    "dk": {"plain": {}, "mask": {"HAS_MASK": True}},
    "dv": {"plain": {}, "mask": {"HAS_MASK": True}},
    "dq": {"plain": {}, "mask": {"HAS_MASK": True}},
    "tensorrt": {
        "plain": {}
    },  # its tiles are tactics of the plugin: in no table, so not among what is shipped
}
# Triton would write PTX 9.4 for sm_90 and up, which asks for a driver of CUDA 13.4; Hopper needs no more than 8.8.
PTX_VERSIONS = {"sm_90": 88}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel to compile.

    Args:
        unaligned: arguments that lose the promise of alignment: for experiments.
        constants: compile-time arguments beyond those of the form, by name.
    """

    entry: str
    form: str
    dtype: str
    head_dim: int
    arch: str
    tile: Tile
    unaligned: tuple[str, ...] = ()
    constants: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return f"{self.entry}/{self.form} {self.dtype} d{self.head_dim} {self.arch}"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a variant.

    Args:
        metadata: name, num_warps, shared (bytes), global_scratch_size, ptx_version, tmem_size (columns).
        log: what ptxas -v said: registers, spills.
        cached: True where it came from the cache.
    """

    variant: Variant
    key: str
    ptx: str
    cubin: bytes
    log: str
    metadata: dict[str, Any]
    cached: bool


def shipped_variants(
    archs: Sequence[str] = ARCHS,
    entries: Sequence[str] = tuple(FORMS),
    dtypes: Sequence[str] = DTYPES,
    head_dims: Sequence[int | str] = HEAD_DIMS,
) -> list[Variant]:
    """List the variants that the table of tiles serves, narrowed to what is asked for.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    for what, asked, known in (
        ("architecture", archs, ARCHS),
        ("entry", entries, tuple(FORMS)),
        ("dtype", dtypes, DTYPES),
        ("head dimension", head_dims, HEAD_DIMS),
    ):
        if unknown := [str(name) for name in asked if name not in known]:
            raise ValueError(
                f"unknown {what} {', '.join(unknown)}: expected some of {', '.join(map(str, known))}"
            )
    return [
        Variant(entry, form, dtype, head_dim, arch, tile_for(entry, dtype, head_dim, arch))
        for arch in archs
        for entry in entries
        for form in FORMS[entry]
        for dtype in dtypes
        for head_dim in HEAD_DIMS
        if head_dim in head_dims and has_tile(entry, dtype, head_dim, arch)
    ]


def request(variant: Variant) -> dict[str, Any]:
    """Return what the compiler is told of a variant: the kernel's place, types, constants, promises, options."""
    entry = ENTRIES[variant.entry]
    flags = FORMS[variant.entry][variant.form] | dict(variant.constants)
    constants = entry.constants(variant.dtype, variant.head_dim, variant.tile, **flags)
    options = {"num_warps": variant.tile.num_warps, "num_stages": variant.tile.num_stages}
    if (ptx_version := PTX_VERSIONS.get(variant.arch)) is not None:
        options["ptx_version"] = ptx_version
    return {
        "file": entry.file,
        "function": entry.function,
        "signature": entry.signature(variant.dtype, constants),
        "constants": constants,
        "aligned": sorted(entry.aligned - set(variant.unaligned) - constants.keys()),
        "arch": variant.arch,
        "options": options,
    }


def content_key(variant: Variant) -> str:
    """Hash what decides the machine code: the jitted source that a kernel reaches, the request, Triton's version."""
    # Where a function stands is nothing that a compiler sees.
    told = [ENTRIES[variant.entry].source, request(variant) | {"file": ""}, _triton()]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def default_cache() -> Path:
    """Return flashbulb's folder for compiled kernels in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashbulb" / "kernels"


def compile_variants(
    variants: Iterable[Variant], cache: Path, jobs: int = 2
) -> Iterator[tuple[Variant, Compiled | CompilationFailed]]:
    """Compile in `jobs` processes and yield each result as it is ready; what is in the cache is not compiled again.

    A variant that the compiler refuses, or dies of, is yielded with the error, and the others go on.

    Raises:
        KernelUnavailable: Triton is not installed.
    """
    waiting: list[Variant] = []
    for variant in variants:
        if (found := _load(variant, content_key(variant), cache, cached=True)) is not None:
            yield variant, found
        else:
            waiting.append(variant)
    if not waiting:
        return
    cache.mkdir(parents=True, exist_ok=True)
    todo: queue.SimpleQueue[Variant] = queue.SimpleQueue()
    for variant in waiting:
        todo.put(variant)
    done: queue.SimpleQueue[tuple[Variant, Compiled | Exception]] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="flashbulb-triton-") as scratch:
        workers = [_worker(scratch) for _ in range(min(jobs, len(waiting)))]
        taking = threading.Lock()
        threads = [
            threading.Thread(target=_feed, args=(i, workers, taking, scratch, todo, done, cache), daemon=True)
            for i in range(len(workers))
        ]
        try:
            for thread in threads:
                thread.start()
            for _ in waiting:
                variant, result = done.get()
                if not isinstance(result, Compiled | CompilationFailed):
                    raise result
                yield variant, result
        finally:
            with taking:  # with nothing left to take, no worker is started any more
                _drain(todo)
                for worker in workers:
                    worker.kill()
            for thread in threads:
                thread.join()
            for worker in workers:
                _close(worker)


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        raise KernelUnavailable("Triton is not installed: pip install 'flashbulb[gpu]'") from None


def _worker(scratch: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")} | {
        "TRITON_DEFAULT_FP_FUSION": "1",  # multiply-adds are fused; the default changes with Triton's versions
        "TRITON_ALWAYS_COMPILE": "1",  # ptxas says what it did only when it runs
        "TRITON_CACHE_DIR": scratch,
        "NVPTX_ENABLE_DUMP": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "flashbulb_kernels.aot_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _close(worker: "subprocess.Popen[str]") -> None:
    # Leaving it closes its pipes; what could not be written any more does not matter.
    with contextlib.suppress(BrokenPipeError), worker:
        pass


def _drain(todo: "queue.SimpleQueue[Variant]") -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            todo.get_nowait()


def _feed(
    number: int,
    workers: "list[subprocess.Popen[str]]",
    taking: threading.Lock,
    scratch: str,
    todo: "queue.SimpleQueue[Variant]",
    done: "queue.SimpleQueue[tuple[Variant, Compiled | Exception]]",
    cache: Path,
) -> None:
    """Hand variants to one worker, and to another in its place when it has died, until none is left."""
    while True:
        with taking:
            try:
                variant = todo.get_nowait()
            except queue.Empty:
                return
            try:
                if workers[number].poll() is not None:
                    _close(workers[number])
                    workers[number] = _worker(scratch)
            except OSError as error:  # no process is to be had
                done.put((variant, error))
                continue
        try:
            done.put((variant, _compile(variant, workers[number], cache)))
        except Exception as error:  # noqa: BLE001 - raised again where the results are read
            done.put((variant, error))


def _compile(variant: Variant, worker: "subprocess.Popen[str]", cache: Path) -> Compiled:
    assert worker.stdin is not None and worker.stdout is not None
    key = content_key(variant)
    target = cache / key
    with tempfile.TemporaryDirectory(prefix=".new-", dir=cache) as folder:
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # it has died meanwhile
            worker.stdin.write(json.dumps(request(variant) | {"folder": folder}) + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        if not answer:
            raise CompilationFailed(f"{variant}: the compiler's process ended with code {worker.wait()}")
        if error := json.loads(answer)["error"]:
            raise CompilationFailed(f"{variant}: {error}")
        # Another process may have made the same variant: what is there is as good.
        if not target.exists():
            try:
                Path(folder).rename(target)
                Path(folder).mkdir()
            except OSError:
                if not target.exists():
                    raise
    compiled = _load(variant, key, cache, cached=False)
    if compiled is None:
        raise CompilationFailed(f"{variant}: {target} is incomplete; remove it and compile again")
    return compiled


def _load(variant: Variant, key: str, cache: Path, *, cached: bool) -> Compiled | None:
    folder = cache / key
    try:
        return Compiled(
            variant=variant,
            key=key,
            ptx=(folder / "kernel.ptx").read_text(encoding="utf-8"),
            cubin=(folder / "kernel.cubin").read_bytes(),
            log=(folder / "ptxas.log").read_text(encoding="utf-8"),
            metadata=json.loads((folder / "metadata.json").read_text(encoding="utf-8")),
            cached=cached,
        )
    except FileNotFoundError:
        return None
