"""Which backend runs a bundle: by bundle and machine, and never another one than was asked for."""

from pathlib import Path

import pytest

from flashbulb_distill.bundle import File, Manifest, open_bundle
from flashbulb_distill.bundle.engines import Engine, EngineManifest, Flavor, Profile
from flashbulb_service.backends.choice import Machine, choose_backend, this_machine
from flashbulb_service.errors import BackendUnavailable
from support.tiny_bundle import make_tiny_bundle

ALL = frozenset({"onnx", "tensorrt", "torch"})
FULL = Machine(ALL, frozenset({"onnxruntime", "tensorrt", "torch"}), ("sm_89",))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return open_bundle(make_tiny_bundle(tmp_path_factory.mktemp("choice"))).manifest


def holding(manifest: Manifest, *names: str) -> Manifest:
    file = File(sha256="0" * 64, bytes=1)
    return manifest.model_copy(update={"files": {**manifest.files, **dict.fromkeys(names, file)}})


def engines(target: str, flavor: Flavor = "standard") -> EngineManifest:
    shape = Profile(smallest=(1,), usual=(1,), largest=(1,))
    engine = Engine(
        file="decoder.engine", sha256="0" * 64, bytes=1, graph="0" * 64, profiles=({"t": shape},), build_s=1
    )
    return EngineManifest(
        schema_version=1,
        flavor=flavor,
        runtime_version="11.4",
        targets=(target,),
        gpu=None,
        bundle_sha256="0" * 64,
        shapes=((64, 64),),
        max_batch=1,
        engines={"decoder": engine},
    )


def test_auto_takes_the_fastest_that_bundle_and_machine_both_have(plain: Manifest) -> None:
    built, ada = holding(plain, "transformer/model.safetensors"), [engines("sm_89")]
    assert choose_backend("auto", built, FULL, ada) == "tensorrt"
    assert choose_backend("auto", built, Machine(ALL, FULL.packages, ("sm_90",)), ada) == "onnx"
    assert (
        choose_backend("auto", built, Machine(ALL, FULL.packages - {"tensorrt"}, ("sm_89",)), ada) == "onnx"
    )
    assert choose_backend("auto", built, Machine(ALL, frozenset({"torch"})), ada) == "torch"
    assert choose_backend("auto", plain, FULL) == "onnx"


def test_engines_of_a_flavor_need_its_own_runtime(plain: Manifest) -> None:
    only_rtx = Machine(ALL, frozenset({"onnxruntime", "tensorrt_rtx"}), ("sm_89",))
    assert choose_backend("auto", plain, only_rtx, [engines("sm_89", "rtx")]) == "tensorrt"
    assert choose_backend("auto", plain, only_rtx, [engines("sm_89")]) == "onnx"


@pytest.mark.parametrize("wanted", ["onnx", "tensorrt", "torch"])
def test_one_that_was_asked_for_is_taken_where_it_can_run(plain: Manifest, wanted: str) -> None:
    built = holding(plain, "transformer/model.safetensors")
    assert choose_backend(wanted, built, FULL, [engines("sm_89")]) == wanted
    assert choose_backend("synthetic", plain, Machine(frozenset(), frozenset())) == "synthetic"


@pytest.mark.parametrize(
    ("wanted", "targets", "machine", "told"),
    [
        ("tensorrt", (), FULL, "tiny@1 has no engines of the flavor standard: flashbulb export tensorrt"),
        ("tensorrt", ("sm_90",), FULL, "engines for sm_90, and this machine has sm_89"),
        ("tensorrt", ("sm_90",), Machine(ALL, FULL.packages), "has no NVIDIA GPU"),
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
        choose_backend(wanted, plain, machine, [engines(target) for target in targets])
    assert "\n" not in str(caught.value)
    if wanted != "auto":
        assert str(caught.value).startswith(f"backend {wanted!r} was asked for, but ")


def test_this_machine_runs_what_it_serves(plain: Manifest, tmp_path: Path) -> None:
    machine = this_machine()
    assert "onnx" in machine.modules and "onnxruntime" in machine.packages
    if not machine.gpus:
        assert choose_backend("auto", plain, machine) == "onnx"
