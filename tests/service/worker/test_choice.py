"""Which backend runs a bundle: by bundle and machine, and never another one than was asked for."""

from pathlib import Path

import pytest

from flashbulb_distill.bundle import File, Manifest, open_bundle
from flashbulb_service.backends.choice import Machine, choose_backend, engine_targets, this_machine
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


def test_auto_takes_the_fastest_that_bundle_and_machine_both_have(plain: Manifest) -> None:
    built = holding(plain, "engines/sm_89/denoiser.engine", "transformer/model.safetensors")
    assert choose_backend("auto", built, FULL) == "tensorrt"
    assert choose_backend("auto", built, Machine(ALL, FULL.packages, ("sm_90",))) == "onnx"
    assert choose_backend("auto", built, Machine(ALL, FULL.packages - {"tensorrt"}, ("sm_89",))) == "onnx"
    assert choose_backend("auto", built, Machine(ALL, frozenset({"torch"}))) == "torch"
    assert choose_backend("auto", plain, FULL) == "onnx"
    assert engine_targets(built) == {"sm_89"}


@pytest.mark.parametrize("wanted", ["onnx", "tensorrt", "torch"])
def test_one_that_was_asked_for_is_taken_where_it_can_run(plain: Manifest, wanted: str) -> None:
    built = holding(plain, "engines/sm_89/denoiser.engine", "transformer/model.safetensors")
    assert choose_backend(wanted, built, FULL) == wanted
    assert choose_backend("synthetic", plain, Machine(frozenset(), frozenset())) == "synthetic"


@pytest.mark.parametrize(
    ("wanted", "names", "machine", "told"),
    [
        ("tensorrt", (), FULL, "tiny@1 holds no engine: flashbulb export tensorrt"),
        ("tensorrt", ("engines/sm_90/a.engine",), FULL, "engines for sm_90, and this machine has sm_89"),
        ("tensorrt", ("engines/sm_90/a.engine",), Machine(ALL, FULL.packages), "has no NVIDIA GPU"),
        ("tensorrt", (), Machine(frozenset({"onnx"}), FULL.packages), "this version has onnx"),
        ("torch", (), FULL, "holds no weights"),
        ("torch", (), Machine(ALL, frozenset()), "the package torch is not installed: pip install"),
        ("onnx", (), Machine(ALL, frozenset()), "the package onnxruntime is not installed"),
        ("auto", (), Machine(ALL, frozenset()), "found none: tensorrt: the package"),
    ],
)
def test_one_that_cannot_run_is_refused_in_one_line_with_its_reason(
    plain: Manifest, wanted: str, names: tuple[str, ...], machine: Machine, told: str
) -> None:
    with pytest.raises(BackendUnavailable, match=told) as caught:
        choose_backend(wanted, holding(plain, *names), machine)
    assert "\n" not in str(caught.value)
    if wanted != "auto":
        assert str(caught.value).startswith(f"backend {wanted!r} was asked for, but ")


def test_this_machine_runs_what_it_serves(plain: Manifest, tmp_path: Path) -> None:
    machine = this_machine()
    assert "onnx" in machine.modules and "onnxruntime" in machine.packages
    if not machine.gpus:
        assert choose_backend("auto", plain, machine) == "onnx"
