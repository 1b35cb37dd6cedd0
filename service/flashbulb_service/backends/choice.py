"""Which backend runs a bundle on a machine: chosen by what the bundle holds and what the machine has.

One that was asked for by name is used or refused, never replaced. A backend is one module of this package.
"""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from flashbulb_distill.bundle import Manifest
from flashbulb_distill.bundle.engines import EngineManifest, Flavor
from flashbulb_service.errors import BackendUnavailable

AUTO = "auto"
PREFERRED = ("tensorrt", "onnx", "torch")  # what `auto` tries, in this order; synthetic only when asked for
RUNTIMES: Mapping[Flavor, str] = {"standard": "tensorrt", "rtx": "tensorrt_rtx"}  # engines -> what runs them
PACKAGES: Mapping[str, tuple[str, str]] = {  # name -> the package that it needs, and how to get it
    "onnx": ("onnxruntime", "pip install flashbulb"),
    "torch": ("torch", "pip install 'flashbulb[distill]'"),
}
NVIDIA_SMI_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Machine:
    """What matters of a machine."""

    modules: frozenset[str]  # backends that this version of the service has
    packages: frozenset[str]  # that are installed, of those that backends need
    gpus: tuple[str, ...] = ()  # compute capabilities, such as "sm_89"


def choose_backend(
    wanted: str, manifest: Manifest, machine: Machine, engines: Sequence[EngineManifest] = ()
) -> str:
    """Return the name of the backend that runs a bundle: pure, so that it can be told before anything is loaded.

    Args:
        engines: that lie beside the bundle, as `list_engines` finds them.
    Raises:
        BackendUnavailable: the one that was asked for cannot; or with "auto", none can. Says why, in one line.
    """
    if wanted == "synthetic":
        return wanted
    if wanted != AUTO:
        if (problem := obstacle(wanted, manifest, machine, engines)) is not None:
            raise BackendUnavailable(f"backend {wanted!r} was asked for, but {problem}")
        return wanted
    problems = {name: obstacle(name, manifest, machine, engines) for name in PREFERRED}
    for name, problem in problems.items():
        if problem is None:
            return name
    told = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise BackendUnavailable(
        f"expected a backend that can run {manifest.name}@{manifest.version}, found none: {told}"
    )


def obstacle(
    name: str, manifest: Manifest, machine: Machine, engines: Sequence[EngineManifest] = ()
) -> str | None:
    """Say why a backend cannot run a bundle here; None when it can."""
    model = f"{manifest.name}@{manifest.version}"
    if name not in machine.modules:
        return f"this version has {', '.join(sorted(machine.modules))}"
    if name == "tensorrt":
        return _engine_obstacle(model, machine, engines)
    package, remedy = PACKAGES[name]
    if package not in machine.packages:
        return f"the package {package} is not installed: {remedy}"
    if name == "onnx":
        missing = [
            file for file in manifest.components.model_dump().values() if not str(file).endswith(".onnx")
        ]
        return f"{model} has no ONNX graph in {missing[0]}" if missing else None
    return None if _has(manifest, ".safetensors") else f"{model} holds no weights (*.safetensors)"


def _engine_obstacle(model: str, machine: Machine, engines: Sequence[EngineManifest]) -> str | None:
    installed = {flavor for flavor, package in RUNTIMES.items() if package in machine.packages}
    if not installed:
        return f"neither {' nor '.join(RUNTIMES.values())} is installed: pip install 'flashbulb[tensorrt]'"
    runnable = [engine for engine in engines if engine.flavor in installed]
    if not runnable:
        flavors = ", ".join(sorted(installed))
        return f"{model} has no engines of the flavor {flavors}: flashbulb export tensorrt"
    targets = {target for engine in runnable for target in engine.targets}
    if not targets & set(machine.gpus):
        here = ", ".join(machine.gpus) or "no NVIDIA GPU"
        return f"{model} has engines for {', '.join(sorted(targets))}, and this machine has {here}"
    return None


@cache
def this_machine() -> Machine:
    """Look at this machine, once; nothing is imported for it."""
    modules = {name for name in PREFERRED if find_spec(f"flashbulb_service.backends.{name}")}
    wanted = {*RUNTIMES.values(), *(package for package, _ in PACKAGES.values())}
    packages = {package for package in wanted if find_spec(package)}
    return Machine(frozenset(modules), frozenset(packages), _gpus())


def _gpus() -> tuple[str, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    try:
        done = subprocess.run(
            [command, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # a driver that does not answer counts as no GPU
        return ()
    return tuple("sm_" + line.strip().replace(".", "") for line in done.stdout.splitlines() if line.strip())


def _has(manifest: Manifest, suffix: str) -> bool:
    return any(name.endswith(suffix) for name in manifest.files)
