"""Which backend runs a bundle: by bundle and machine, and never another one than was asked for."""

import os
import sys
from pathlib import Path

import pytest

from flashbulb_distill.bundle import File, Manifest, open_bundle
from flashbulb_distill.bundle.engines import Engine, EngineManifest, Flavor, Profile
from flashbulb_service.backends.choice import Machine, choose_backend, this_machine
from flashbulb_service.backends.cuda import Gpu
from flashbulb_service.errors import BackendUnavailable
from support.tiny_bundle import make_tiny_bundle

ALL = frozenset({"onnx", "tensorrt", "torch"})
PACKAGES = frozenset({"onnxruntime", "tensorrt", "torch"})
VERSION, SHA256 = "11.4.0.106", "0" * 64
L4, H100 = Gpu("NVIDIA L4", "sm_89"), Gpu("NVIDIA H100", "sm_90")
FULL = Machine(ALL, PACKAGES, {"standard": VERSION}, L4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return open_bundle(make_tiny_bundle(tmp_path_factory.mktemp("choice"))).manifest


def holding(manifest: Manifest, *names: str) -> Manifest:
    file = File(sha256="0" * 64, bytes=1)
    return manifest.model_copy(update={"files": {**manifest.files, **dict.fromkeys(names, file)}})


def engines(target: str, flavor: Flavor = "standard", **changes: str) -> EngineManifest:
    shape = Profile(smallest=(1,), usual=(1,), largest=(1,))
    engine = Engine(
        file="decoder.engine", sha256="0" * 64, bytes=1, graph="0" * 64, profiles=({"t": shape},), build_s=1
    )
    manifest = EngineManifest(
        schema_version=1,
        flavor=flavor,
        runtime_version=VERSION,
        targets=(target,),
        gpu=None,
        bundle_sha256=SHA256,
        shapes=((64, 64),),
        max_batch=1,
        engines={"decoder": engine},
    )
    return manifest.model_copy(update=changes)


def test_auto_takes_the_fastest_that_bundle_and_machine_both_have(plain: Manifest) -> None:
    built, ada = holding(plain, "transformer/model.safetensors"), [engines("sm_89")]
    assert choose_backend("auto", built, FULL, ada, SHA256) == "tensorrt"
    hopper = Machine(ALL, PACKAGES, FULL.runtimes, H100)
    assert choose_backend("auto", built, hopper, ada, SHA256) == "onnx"
    without = Machine(ALL, PACKAGES - {"tensorrt"}, {}, L4)
    assert choose_backend("auto", built, without, ada, SHA256) == "onnx"
    assert choose_backend("auto", built, Machine(ALL, frozenset({"torch"})), ada, SHA256) == "torch"
    assert choose_backend("auto", plain, FULL) == "onnx"


def test_engines_of_a_flavor_need_its_own_runtime(plain: Manifest) -> None:
    only_rtx = Machine(ALL, frozenset({"onnxruntime", "tensorrt_rtx"}), {"rtx": VERSION}, L4)
    assert choose_backend("auto", plain, only_rtx, [engines("sm_89", "rtx")], SHA256) == "tensorrt"
    assert choose_backend("auto", plain, only_rtx, [engines("sm_89")], SHA256) == "onnx"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bundle_sha256": "1" * 64}, "expected engines of bundle 000000000000, got those of 111111111111"),
        ({"runtime_version": "11.3"}, "expected engines of TensorRT 11.4.0.106, got those of 11.3"),
        ({"gpu": "NVIDIA RTX 4090"}, "expected engines tuned on NVIDIA L4, got those tuned on NVIDIA RTX"),
    ],
)
def test_auto_takes_no_engines_that_loading_would_refuse(
    plain: Manifest, changes: dict[str, str], told: str
) -> None:
    """Only flavor and target were looked at: tensorrt was taken, and refused the bundle that ONNX could run."""
    refused = [engines("sm_89", **changes)]
    assert choose_backend("auto", plain, FULL, refused, SHA256) == "onnx"
    assert choose_backend("auto", plain, FULL, [*refused, engines("sm_89")], SHA256) == "tensorrt"
    with pytest.raises(BackendUnavailable, match=told):
        choose_backend("tensorrt", plain, FULL, refused, SHA256)


@pytest.mark.parametrize("wanted", ["onnx", "tensorrt", "torch"])
def test_one_that_was_asked_for_is_taken_where_it_can_run(plain: Manifest, wanted: str) -> None:
    built = holding(plain, "transformer/model.safetensors")
    assert choose_backend(wanted, built, FULL, [engines("sm_89")], SHA256) == wanted
    assert choose_backend("synthetic", plain, Machine(frozenset(), frozenset())) == "synthetic"


@pytest.mark.parametrize(
    ("wanted", "targets", "machine", "told"),
    [
        ("tensorrt", (), FULL, "the bundle has no engines; run: flashbulb export tensorrt"),
        ("tensorrt", ("sm_90",), FULL, "expected engines for sm_89, got those for sm_90"),
        ("tensorrt", ("sm_90",), Machine(ALL, FULL.packages), "no NVIDIA GPU was found"),
        ("tensorrt", (), Machine(frozenset({"onnx"}), FULL.packages), "this version has onnx"),
        ("torch", (), FULL, "holds no weights"),
        ("torch", (), Machine(ALL, frozenset()), "the package torch is not installed: pip install"),
        ("onnx", (), Machine(ALL, frozenset()), "the package onnxruntime is not installed"),
        ("auto", (), Machine(ALL, frozenset()), "found none: tensorrt: neither tensorrt nor"),
    ],
)
def test_one_that_cannot_run_is_refused_in_one_line_with_its_reason(
    plain: Manifest, wanted: str, targets: tuple[str, ...], machine: Machine, told: str
) -> None:
    with pytest.raises(BackendUnavailable, match=told) as caught:
        choose_backend(wanted, plain, machine, [engines(target) for target in targets], SHA256)
    assert "\n" not in str(caught.value)
    if wanted != "auto":
        assert str(caught.value).startswith(f"backend {wanted!r} was asked for, but ")


def test_this_machine_runs_what_it_serves(plain: Manifest, tmp_path: Path) -> None:
    machine = this_machine()
    assert "onnx" in machine.modules and "onnxruntime" in machine.packages
    if machine.gpu is None:
        assert choose_backend("auto", plain, machine) == "onnx"


DRIVER = """
import os
from types import SimpleNamespace
CARDS = [("NVIDIA T1000", 7, 5), ("NVIDIA L4", 8, 9)]
def cudaGetDeviceProperties(device):
    name, major, minor = CARDS[int(os.environ["CUDA_VISIBLE_DEVICES"].split(",")[device])]
    return 0, SimpleNamespace(name=name.encode(), major=major, minor=minor)
"""


def test_the_gpu_of_a_machine_is_the_one_that_a_backend_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All GPUs counted, also those that CUDA_VISIBLE_DEVICES hides."""
    for name, text in (
        ("cuda/bindings/runtime.py", DRIVER),
        ("tensorrt.py", f"__version__ = {VERSION!r}; print('a banner')"),
        ("tensorrt_rtx.py", "__version__ = '1.7.1.116'"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    machine = this_machine.__wrapped__()
    assert machine.gpu == L4 and machine.runtimes == {"standard": VERSION, "rtx": "1.7.1.116"}
    (tmp_path / "tensorrt_rtx.py").write_text(
        "raise OSError('libtensorrt_rtx.so: cannot open shared object')"
    )
    assert this_machine.__wrapped__().runtimes == {"standard": VERSION}, "one that is broken hides no other"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = this_machine.__wrapped__()
    assert machine.gpu is None and machine.problem.startswith("ValueError: "), "what CUDA's call raised there"
