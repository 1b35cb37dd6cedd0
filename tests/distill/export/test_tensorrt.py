"""Engines of TensorRT for RTX are built here, with no GPU; none is run."""

import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from flashbulb_distill.bundle import BundleError, open_bundle
from flashbulb_distill.bundle.engines import engine_file, list_engines, read_engine_manifest, refusal
from flashbulb_distill.export.profiles import Bucket, make_profile
from flashbulb_distill.export.tensorrt import (
    EngineError,
    Gpu,
    TargetError,
    build_engine,
    build_engines,
    check_targets,
    open_for_engines,
)
from flashbulb_service.cli import run
from support.exported import COMPONENTS, export_tiny
from support.tiny_bundle import make_tiny_bundle

trt = pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt-rtx` is not installed")

MODELS = Path(__file__).resolve().parents[3] / "models"
H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90")

BUCKETS = {
    "sdxl": Bucket(8, 12, text=(77,), embeds=77),
    "sd3": Bucket(8, 12, text=(21,), embeds=21),
    "sd35": Bucket(8, 12, text=(21,), embeds=21),
    "cogvideox-2b": Bucket(4, 6, text=(16,), embeds=16, frames=3),
    "cogvideox-5b": Bucket(4, 6, text=(16,), embeds=16, frames=3),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "name"), COMPONENTS)
def test_every_component_of_every_family_becomes_an_engine(family, name):
    exported = export_tiny(family, name)
    plan, profiles = build_engine(trt, exported.path, [BUCKETS[family]], 2, targets=("sm_89",))
    assert len(plan) > 10_000
    assert len(profiles) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whole_attention_of_opset_23_becomes_an_engine():
    """A head of 8 numbers in float32 has no kernel of its own: TensorRT is told that it may be split."""
    exported = export_tiny("sd35", "transformer", opset=23)
    before = exported.path.read_bytes()
    plan, _ = build_engine(trt, exported.path, [BUCKETS["sd35"]], 2, targets=("sm_89",))
    assert len(plan) > 10_000
    assert exported.path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_of_the_emoji_student_lie_beside_an_unchanged_bundle(tmp_path, capsys):
    bundle = tmp_path / "1"
    shutil.copytree(MODELS / "emoji" / "1", bundle, ignore=shutil.ignore_patterns("engines"))
    before = open_bundle(bundle)
    assert run(["export", "tensorrt", str(bundle), "--flavor", "rtx", "--target", "sm_89,sm_86"]) == 0
    ((folder, manifest),) = list_engines(bundle, "rtx")
    assert capsys.readouterr().out.strip() == str(folder)
    assert manifest.targets == ("sm_86", "sm_89")
    assert manifest.max_batch == before.manifest.max_batch
    assert set(manifest.engines) == {"text_encoder", "denoiser", "decoder"}
    for engine in manifest.engines.values():
        engine_file(folder, engine)
        assert engine.graph in {file.sha256 for file in before.manifest.files.values()}
    assert open_bundle(bundle).sha256 == before.sha256 == manifest.bundle_sha256
    again = run(["export", "tensorrt", str(bundle), "--target", "sm_86,sm_89"])
    assert (again, "expected new engines" in capsys.readouterr().err) == (1, True)


@pytest.fixture
def tiny(tmp_path):
    path = make_tiny_bundle(tmp_path, parity={"passed": True})
    return open_for_engines(path)


def test_an_unsupported_operator_is_named(tiny, tmp_path):
    node = helper.make_node("Sharpen", ["latents"], ["pixels"], name="last/sharpen", domain="com.example")
    image = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["b", 64, 8, 8])
    latents = helper.make_tensor_value_info("latents", TensorProto.FLOAT, ["b", 64, 8, 8])
    graph = helper.make_graph([node], "g", [latents], [image])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "odd.onnx")
    with pytest.raises(EngineError, match="Sharpen"):
        build_engine(trt, tmp_path / "odd.onnx", [Bucket(8, 8, (14,))], 2, targets=("sm_89",))


def test_a_failed_build_leaves_nothing(tiny):
    def spoil(model):
        model.graph.node[0].op_type = "NoSuchOperator"

    with pytest.raises(EngineError, match="NoSuchOperator"):
        build_engines(tiny, "rtx", ("sm_89",), rewrite=spoil)
    assert [path.name for path in (tiny.path / "engines").iterdir()] == []


def test_engines_of_graphs_without_a_parity_verdict_are_refused(tmp_path):
    with pytest.raises(BundleError, match="passed the parity gate"):
        open_for_engines(make_tiny_bundle(tmp_path))


@pytest.mark.parametrize("target", ["", "sm_90", "sm89", "sm_89,sm_42"])
def test_an_unknown_target_is_wrong_usage_and_lists_those_that_there_are(tiny, target, capsys):
    assert run(["export", "tensorrt", str(tiny.path), "--target", target]) == 2
    assert "sm_75, sm_80, sm_86, sm_89, sm_120" in capsys.readouterr().err


def test_standard_engines_need_a_gpu_and_are_for_it_alone():
    with pytest.raises(TargetError, match="expected a GPU"):
        check_targets(trt, "standard", (), None)
    with pytest.raises(TargetError, match=r"expected --target sm_90, .*H100"):
        check_targets(trt, "standard", ("sm_89",), H100)
    assert check_targets(trt, "standard", (), H100) == ("sm_90",)


def test_a_missing_tensorrt_is_one_line(tiny, capsys):
    pytest.importorskip("torch")
    if shutil.which("nvidia-smi"):
        pytest.skip("a GPU may bring tensorrt")
    assert run(["export", "tensorrt", str(tiny.path), "--flavor", "standard"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'flashbulb[tensorrt]'" in error


def test_a_changed_engine_is_refused(tiny):
    folder = build_engines(tiny, "rtx", ("sm_89",))
    engine = read_engine_manifest(folder).engines["decoder"]
    path = engine_file(folder, engine)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"decoder\.engine: expected sha256"):
        engine_file(folder, engine)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"bundle_sha256": "0" * 64}, "expected engines of bundle 000000000000"),
        ({"runtime_version": "1.8"}, "expected engines of TensorRT 1.8"),
        ({"capability": "sm_120"}, "expected engines for sm_120, got those for sm_89"),
        ({"gpu": "other"}, None),  # an RTX engine is finished on the GPU that loads it
    ],
)
def test_engines_of_another_bundle_version_or_gpu_are_refused(tiny, change, reason):
    folder = build_engines(tiny, "rtx", ("sm_89",))
    here = {
        "bundle_sha256": tiny.sha256,
        "runtime_version": trt.__version__,
        "capability": "sm_89",
        "gpu": "NVIDIA GeForce RTX 4090",
    }
    found = refusal(read_engine_manifest(folder), **(here | change))
    assert (found is None) if reason is None else found.startswith(reason)


def test_a_profile_spans_batches_and_fixes_the_bucket():
    inputs = {"latents": (None, 16, None, None), "timestep": (None,), "prompt_embeds": (None, None, 4096)}
    inputs |= dict.fromkeys(("input_ids", "input_ids_2", "attention_mask_2"), (None, None))
    profile = make_profile(inputs, Bucket(96, 168, (77, 256), embeds=154), 4)
    assert profile["latents"].smallest == (1, 16, 96, 168)
    assert profile["latents"].largest == (4, 16, 96, 168)
    assert profile["timestep"].usual == (2,)
    assert profile["prompt_embeds"].largest == (4, 154, 4096)
    assert profile["input_ids"].largest == (4, 77)
    assert profile["input_ids_2"].largest == profile["attention_mask_2"].largest == (4, 256)
    with pytest.raises(ValueError, match="expected an input of latents"):
        make_profile({"mystery": (None,)}, Bucket(8, 8, (77,)), 4)
    with pytest.raises(ValueError, match="input_ids_2: expected the axis 'text' to be fixed"):
        make_profile(inputs, Bucket(8, 8, (77,), embeds=77), 4)
    with pytest.raises(ValueError, match="prompt_embeds: expected the axis 'embeddings' to be fixed"):
        make_profile(inputs, Bucket(8, 8, (77, 256)), 4)
