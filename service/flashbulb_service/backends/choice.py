"""Which backend runs a bundle on a machine: chosen by what the bundle holds and what the machine has.

One that was asked for by name is used or refused, never replaced. A backend is one module of this package.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

from flashbulb_distill.bundle import Manifest
from flashbulb_distill.bundle.engines import EngineManifest, Flavor, refusal
from flashbulb_service.backends.cuda import Gpu
from flashbulb_service.errors import BackendUnavailable

AUTO = "auto"
PREFERRED = ("tensorrt", "onnx", "torch")  # what `auto` tries, in this order; synthetic only when asked for
RUNTIMES: Mapping[Flavor, str] = {"standard": "tensorrt", "rtx": "tensorrt_rtx"}  # engines -> what runs them
PACKAGES: Mapping[str, tuple[str, str]] = {  # name -> the package that it needs, and how to get it
    "onnx": ("onnxruntime", "pip install flashbulb"),
    "torch": ("torch", "pip install 'flashbulb[distill]'"),
}
LOOK = "from flashbulb_service.backends.tensorrt import tell; tell()"
LOOK_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """What matters of a machine."""

    modules: frozenset[str]  # backends that this version of the service has
    packages: frozenset[str]  # that are installed, of those that backends need
    runtimes: Mapping[Flavor, str] = field(default_factory=dict)  # TensorRT's versions, where there is a GPU
    gpu: Gpu | None = None  # the one that a backend takes: CUDA's first
    problem: str = ""  # why no GPU was found


def choose_backend(
    wanted: str,
    manifest: Manifest,
    machine: Machine,
    engines: Sequence[EngineManifest] = (),
    bundle_sha256: str = "",
) -> str:
    """Return the name of the backend that runs a bundle: pure, so that it can be told before anything is loaded.

    Args:
        engines: that lie beside the bundle, as `list_engines` finds them; bundle_sha256: what they have to name.
    Raises:
        BackendUnavailable: the one that was asked for cannot; or with "auto", none can. Says why, in one line.
    """
    if wanted == "synthetic":
        return wanted
    if wanted != AUTO:
        if (problem := obstacle(wanted, manifest, machine, engines, bundle_sha256)) is not None:
            raise BackendUnavailable(f"backend {wanted!r} was asked for, but {problem}")
        return wanted
    problems = {name: obstacle(name, manifest, machine, engines, bundle_sha256) for name in PREFERRED}
    for name, problem in problems.items():
        if problem is None:
            return name
    told = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise BackendUnavailable(
        f"expected a backend that can run {manifest.name}@{manifest.version}, found none: {told}"
    )


def obstacle(
    name: str,
    manifest: Manifest,
    machine: Machine,
    engines: Sequence[EngineManifest] = (),
    bundle_sha256: str = "",
) -> str | None:
    """Say why a backend cannot run a bundle here; None when it can."""
    model = f"{manifest.name}@{manifest.version}"
    if name not in machine.modules:
        return f"this version has {', '.join(sorted(machine.modules))}"
    if name == "tensorrt":
        return _engine_obstacle(machine, engines, bundle_sha256)
    package, remedy = PACKAGES[name]
    if package not in machine.packages:
        return f"the package {package} is not installed: {remedy}"
    if name == "onnx":
        missing = [
            file for file in manifest.components.model_dump().values() if not str(file).endswith(".onnx")
        ]
        return f"{model} has no ONNX graph in {missing[0]}" if missing else None
    return None if _has(manifest, ".safetensors") else f"{model} holds no weights (*.safetensors)"


def choose_engines(
    manifests: Sequence[EngineManifest], bundle_sha256: str, versions: Mapping[Flavor, str], gpu: Gpu
) -> EngineManifest:
    """Return the engines to load: those that nothing speaks against, the tuned flavour first.

    Raises:
        BackendUnavailable: there are none; the message says why, set by set.
    """
    reasons = []
    for flavor in RUNTIMES:
        for manifest in manifests:
            if manifest.flavor != flavor:
                continue
            if flavor not in versions:
                reasons.append(
                    f"expected the package {RUNTIMES[flavor]} for {flavor} engines, it is not installed"
                )
                continue
            reason = refusal(
                manifest,
                bundle_sha256=bundle_sha256,
                runtime_version=versions[flavor],
                capability=gpu.capability,
                gpu=gpu.name,
            )
            if reason is None:
                return manifest
            reasons.append(reason)
    told = "; ".join(reasons) or "the bundle has no engines"
    raise BackendUnavailable(
        f"no engine for {gpu.name} ({gpu.capability}): {told}; run: flashbulb export tensorrt"
    )


def _engine_obstacle(machine: Machine, engines: Sequence[EngineManifest], bundle_sha256: str) -> str | None:
    if not machine.packages & {*RUNTIMES.values()}:
        return f"neither {' nor '.join(RUNTIMES.values())} is installed: pip install 'flashbulb[tensorrt]'"
    if machine.gpu is None:
        return f"no NVIDIA GPU was found: {machine.problem or 'the package cuda-bindings is not installed'}"
    try:
        choose_engines(engines, bundle_sha256, machine.runtimes, machine.gpu)
    except BackendUnavailable as error:
        return str(error)
    return None


@cache
def this_machine() -> Machine:
    """Look at this machine, once; nothing is imported for it here."""
    modules = {name for name in PREFERRED if find_spec(f"flashbulb_service.backends.{name}")}
    wanted = {*RUNTIMES.values(), *(package for package, _ in PACKAGES.values())}
    packages = {package for package in wanted if find_spec(package)}
    can_have_engines = find_spec("cuda") and packages & {*RUNTIMES.values()}
    return Machine(frozenset(modules), frozenset(packages), *(_look() if can_have_engines else ()))


def _look() -> tuple[dict[Flavor, str], Gpu | None, str]:
    """Ask TensorRT and CUDA as a backend does, in another process: this one may fork, or never need them."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=LOOK_TIMEOUT_S, check=True
        )
    except subprocess.CalledProcessError as error:
        problem = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except (OSError, subprocess.SubprocessError) as error:  # a driver that does not answer
        problem = " ".join(str(error).split())
    else:
        told = json.loads(done.stdout.splitlines()[-1])
        return told["runtimes"], Gpu(**told["gpu"]), ""
    log.warning("TensorRT is left out: %s", problem)
    return {}, None, problem


def _has(manifest: Manifest, suffix: str) -> bool:
    return any(name.endswith(suffix) for name in manifest.files)
