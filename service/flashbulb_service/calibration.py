"""What a student does on this machine: time by batch size, and whether its neighbours change a picture's bytes.

Times of another machine are better than none; a verdict of another machine is none, so it is tried at the first load.

A published bundle never changes, so this is kept beside it: a file in the state folder for each (bundle, backend,
machine, threads), which workers prefer to what the bundle's exporter measured elsewhere.
"""

import hashlib
import json
import logging
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashbulb_distill.bundle import Bundle, Manifest
from flashbulb_distill.bundle.engines import list_engines
from flashbulb_service.backends import Backend, ImageRequest, Student, create_backend
from flashbulb_service.backends.choice import choose_backend, this_machine
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.catalog import row_tokens
from flashbulb_service.cores import usable_cores
from flashbulb_service.scheduler import batch_cap, rows_within
from flashbulb_service.settings import Settings

log = logging.getLogger(__name__)

TRIAL_MIXES = 12
# The median of 7 batches with a tenth of noise is off by 5 %, that of 25 by 2.5 %: planning with it shows.
LEAST_ROUNDS, ROUNDS_S = 7, 30.0
TRIAL_S = 10.0  # a load takes no longer for it

_PROMPTS = ("", "red apple", "a dog", "blue heart on a rocket", "two green birds in the morning sun")


class Calibration(BaseModel):
    """One measurement; `where` says of what and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    where: dict[str, str | int]
    times_ms: dict[int, float] = Field(min_length=1)  # batch size -> median of a whole batch
    batch_invariant: bool  # equal bytes in every batch size
    canonical: int = Field(ge=1)  # the size to pad to where it is not
    num_mixes: int


class Verdict(BaseModel):
    """What batches do to a picture's bytes; `where` says of what and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    where: dict[str, str | int]
    largest: int = Field(ge=1)  # batch that was tried
    canonical: int | None  # the size to pad to; None: equal bytes in every size
    num_mixes: int

    @classmethod
    def of(cls, calibration: Calibration, cap: int) -> Self:
        """Return the verdict of a calibration, for batches of up to `cap`."""
        canonical = None if calibration.batch_invariant else min(calibration.canonical, cap)
        return cls(where=calibration.where, largest=cap, canonical=canonical, num_mixes=calibration.num_mixes)


@dataclass(frozen=True)
class Calibrated:
    """A loaded student with what is known of it here."""

    student: Student
    cap: int  # the largest batch worth forming
    times_ms: Mapping[int, float]  # batch size -> milliseconds; empty = unknown


def load_student(bundle: Bundle, settings: Settings, cache: EmbeddingCache | None = None) -> Calibrated:
    """Load a verified bundle; choose its batch cap and padding by this machine's calibration, else the exporter's."""
    manifest, name = bundle.manifest, backend_of(bundle, settings)
    where = place(bundle, name, settings.threads)
    found = read_calibration(settings.data.expanduser(), where)
    times = found.times_ms if found else manifest.calibration.get(name, {})
    cap = batch_cap(manifest.max_batch, settings.max_batch, times)
    cap = rows_within(settings.max_batch_tokens, min(row_tokens(manifest)), cap)
    backend = create_backend(name, threads=settings.threads, cache=cache, synthetic=settings.synthetic)
    backend.load(bundle)
    canonical = None
    if (
        settings.determinism == "strict" and name != "synthetic"
    ):  # which draws each row from its request alone
        kept = Verdict.of(found, cap) if found else read_verdict(settings.data.expanduser(), where, cap)
        canonical = (kept or _judge(backend, bundle, where, cap, settings)).canonical
    if canonical is None:
        return Calibrated(Student(backend), cap, times)
    canonical = rows_within(settings.max_batch_tokens, max(row_tokens(manifest)), canonical)
    padded = {size: ms for size, ms in times.items() if size == canonical}
    return Calibrated(Student(backend, canonical), min(cap, canonical), padded)


def backend_of(bundle: Bundle, settings: Settings) -> str:
    """Return the backend that runs a bundle with these settings on this machine.

    Raises:
        BackendUnavailable: the one that was asked for cannot, or none can.
    """
    engines = [manifest for _, manifest in list_engines(bundle.path)]
    return choose_backend(settings.backend, bundle.manifest, this_machine(), engines, bundle.sha256)


def known_times(bundle: Bundle, settings: Settings) -> tuple[Mapping[int, float], str]:
    """Return batch size -> milliseconds (empty: unknown) and where they were measured: "here" or "by its exporter"."""
    name = backend_of(bundle, settings)
    found = read_calibration(settings.data.expanduser(), place(bundle, name, settings.threads))
    if found:
        return found.times_ms, "here"
    return bundle.manifest.calibration.get(name, {}), "by its exporter"


def place(bundle: Bundle, backend: str, threads: int) -> dict[str, str | int]:
    """Say what a calibration depends on."""
    return {
        "bundle": bundle.sha256,
        "backend": backend,
        "runtime": _runtime(backend),
        "threads": threads,
        "cpu": _cpu_model(),
        "cores": usable_cores(),
    }


def read_calibration(data: Path, where: Mapping[str, str | int]) -> Calibration | None:
    """Return the calibration of a place; None when there is none that can be used."""
    try:
        found = Calibration.model_validate_json(_file(data, where).read_bytes())
    except (FileNotFoundError, ValidationError):  # of another schema, or cut short: measured again
        return None
    return found if found.where == dict(where) else None


def write_calibration(data: Path, calibration: Calibration) -> Path:
    """Keep a calibration, atomically; return its file."""
    return _write(_file(data, calibration.where), calibration)


def _write(file: Path, content: BaseModel) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    with os.fdopen(handle, "w") as stream:
        stream.write(content.model_dump_json(indent=2) + "\n")
    Path(draft).replace(file)
    return file


def read_verdict(data: Path, where: Mapping[str, str | int], largest: int) -> "Verdict | None":
    """Return the verdict on a place for batches of up to `largest`; None when there is none that can be used."""
    try:
        found = Verdict.model_validate_json(_file(data, where, "verdict").read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.where == dict(where) and found.largest == largest else None


def judge(
    backend: Backend,
    bundle: Bundle,
    where: Mapping[str, str | int],
    largest: int,
    *,
    num_mixes: int = TRIAL_MIXES,
    clock: Callable[[], float] = time.monotonic,
) -> "Verdict":
    """Try whether neighbours change a picture on this machine, whatever the exporter's machine did.

    A student that is too slow to be tried in time is drawn alone, which is always the same.
    """
    end, canonical = clock() + TRIAL_S, 1
    for tried in (None, largest):
        if is_invariant(
            Student(backend, tried), bundle.manifest, largest, num_mixes, until=lambda: clock() >= end
        ):
            return Verdict(where=dict(where), largest=largest, canonical=tried, num_mixes=num_mixes)
    return Verdict(where=dict(where), largest=largest, canonical=canonical, num_mixes=num_mixes)


def _judge(
    backend: Backend, bundle: Bundle, where: Mapping[str, str | int], cap: int, settings: Settings
) -> "Verdict":
    """Judge and keep the verdict, so that the next start need not."""
    if cap == 1:
        return Verdict(where=dict(where), largest=1, canonical=None, num_mixes=0)
    verdict = judge(backend, bundle, where, cap)
    told = f"padded to {verdict.canonical}" if verdict.canonical else "any size gives equal bytes"
    model = f"{bundle.manifest.name}@{bundle.manifest.version}"
    log.info("batches of %s on this machine: %s", model, told)
    try:
        _write(_file(settings.data.expanduser(), where, "verdict"), verdict)
    except OSError as error:
        log.warning("the verdict on %s is not kept, and tried again at the next start: %s", model, error)
    return verdict


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Return 1, 2, 4, … and the largest size."""
    return tuple(sorted({*(2**power for power in range(largest.bit_length())), largest}))


def calibrate(
    backend: Backend,
    bundle: Bundle,
    where: Mapping[str, str | int],
    *,
    max_batch: int,
    rounds: int = 25,
    num_mixes: int = 24,
) -> Calibration:
    """Measure a loaded bundle through its backend, at its first size.

    Args:
        rounds: timed batches of each size, after one that warms up; the sizes take turns. Fewer, but at least
            `LEAST_ROUNDS`, where they take longer than `ROUNDS_S` together.
        num_mixes: random batches (neighbours, positions, sizes) whose rows are compared with lone pictures.
    """
    manifest = bundle.manifest
    largest = min(manifest.max_batch, max_batch)
    sizes = batch_sizes(largest)
    times = _times_ms(backend, manifest, sizes, rounds)
    invariant = is_invariant(Student(backend), manifest, largest, num_mixes)
    canonical = batch_cap(manifest.max_batch, max_batch, times)
    if not invariant and not is_invariant(Student(backend, canonical), manifest, canonical, num_mixes):
        canonical = 1  # even at a fixed size neighbours or positions matter
    return Calibration(
        where=dict(where), times_ms=times, batch_invariant=invariant, canonical=canonical, num_mixes=num_mixes
    )


def is_invariant(
    student: Student,
    manifest: Manifest,
    largest: int,
    num_mixes: int,
    *,
    seed: int = 0,
    until: Callable[[], bool] = lambda: False,
) -> bool:
    """Tell whether every picture has the same bytes alone as in random batches of up to `largest`.

    until: when it says so before all mixes were tried, nothing is shown, and the answer is no.
    """
    draw = random.Random(seed)
    shape = manifest.shapes[0]
    pool = [
        ImageRequest(
            draw.choice(_PROMPTS),
            draw.randrange(2**63),
            index,
            shape.width,
            shape.height,
            frames=shape.frames,
        )
        for index in range(2 * largest)
    ]
    alone: dict[ImageRequest, bytes] = {}
    for _ in range(num_mixes):
        if until():
            return False
        batch = draw.sample(pool, draw.randint(1, largest))
        for request, picture in zip(batch, student.generate(batch), strict=True):
            if request not in alone:
                alone[request] = student.generate([request])[0].tobytes()
            if alone[request] != picture.tobytes():
                return False
    return True


def _times_ms(backend: Backend, manifest: Manifest, sizes: Sequence[int], rounds: int) -> dict[int, float]:
    student, shape = Student(backend), manifest.shapes[0]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    begun = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > LEAST_ROUNDS and time.perf_counter() - begun > ROUNDS_S:
            break
        for size in sizes:  # prompts that no cache has seen
            batch = [
                ImageRequest(
                    f"a dog {turn} {size} {row}", row, 0, shape.width, shape.height, frames=shape.frames
                )
                for row in range(size)
            ]
            started = time.perf_counter()
            student.generate(batch)
            seconds[size].append(time.perf_counter() - started)
    return {size: round(statistics.median(values[1:]) * 1000, 3) for size, values in seconds.items()}


def _file(data: Path, where: Mapping[str, str | int], kind: str = "") -> Path:
    name = hashlib.sha256(json.dumps(dict(where), sort_keys=True).encode()).hexdigest()[:32]
    return data / "calibration" / f"{name}{kind and '.'}{kind}.json"


def _runtime(backend: str) -> str:
    if backend != "onnx":
        return backend
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
