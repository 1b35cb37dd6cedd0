"""Bundles: every damage is refused in one line, and reading needs neither torch nor numpy."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from flashbulb_distill.bundle import (
    Betas,
    BundleError,
    Latent,
    Manifest,
    check_unchanged,
    find_model,
    hash_file,
    list_models,
    open_bundle,
    write_manifest,
)
from flashbulb_distill.bundle.bundle import manifest_digest
from support.tiny_bundle import make_tiny_bundle


@pytest.fixture
def bundle(tmp_path):
    return make_tiny_bundle(tmp_path)


def test_a_whole_bundle_opens(bundle):
    opened = open_bundle(bundle)
    assert opened.manifest.name == "tiny"
    assert opened.file("denoiser.onnx").is_file()


def test_one_flipped_byte_anywhere_is_refused(bundle):
    for path in sorted(bundle.rglob("*")):
        data = path.read_bytes()
        for place in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            for mask in (0x01, 0x2A):
                damaged = bytearray(data)
                damaged[place] ^= mask
                path.write_bytes(damaged)
                with pytest.raises(BundleError) as caught:
                    open_bundle(bundle)
                assert "\n" not in str(caught.value)
        path.write_bytes(data)
    open_bundle(bundle)


def test_whitespace_changed_in_the_manifest_is_refused_too(bundle):
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"  ", b" \t", 1))
    with pytest.raises(BundleError, match="changed or damaged"):
        open_bundle(bundle)


def test_a_verified_bundle_is_read_again_only_if_a_file_was_touched(bundle, monkeypatch):
    opened, read = open_bundle(bundle), []

    def watched(path):
        read.append(path.name)
        return hash_file(path)

    monkeypatch.setattr("flashbulb_distill.bundle.bundle.hash_file", watched)
    check_unchanged(opened)
    assert read == ["manifest.json"]
    os.utime(bundle / "decoder.onnx", ns=(0, 0))
    check_unchanged(opened)
    assert {"denoiser.onnx", "decoder.onnx"} < set(read)
    weights = bytearray((bundle / "decoder.onnx").read_bytes())
    weights[-1] ^= 1
    (bundle / "decoder.onnx").write_bytes(weights)
    with pytest.raises(BundleError, match=r"decoder\.onnx: expected sha256"):
        check_unchanged(opened)


def test_a_bundle_that_was_replaced_is_not_the_one_that_was_opened(bundle):
    opened, models = open_bundle(bundle), bundle.parents[1]
    shutil.rmtree(bundle)
    with pytest.raises(BundleError, match=r"found no manifest\.json"):
        check_unchanged(opened)
    make_tiny_bundle(models, licence="MIT")
    with pytest.raises(BundleError, match="export a changed student under a new version"):
        check_unchanged(opened)


@pytest.mark.parametrize("version", [3, "1", None, True])
def test_another_schema_version_is_refused_before_anything_else(bundle, version):
    path = bundle / "manifest.json"
    fields = json.loads(path.read_text())
    fields["schema_version"] = version
    path.write_text(json.dumps(fields, indent=2) + "\n")
    with pytest.raises(BundleError, match="expected schema_version 1 or 2"):
        open_bundle(bundle)


def test_a_missing_file_and_a_stranger_are_refused(bundle):
    (bundle / "stranger.txt").write_text("x")
    with pytest.raises(BundleError, match="only files that the manifest names"):
        open_bundle(bundle)
    (bundle / "stranger.txt").unlink()
    (bundle / "decoder.onnx").unlink()
    with pytest.raises(BundleError, match="not found"):
        open_bundle(bundle)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"found no manifest\.json"):
        open_bundle(tmp_path)


def test_models_are_found_by_name_and_by_version_the_latest_first(tmp_path):
    for version in (1, 2, 10):
        make_tiny_bundle(tmp_path, version=version)
    assert [(name, version) for name, version, _ in list_models(tmp_path)] == [
        ("tiny", 1),
        ("tiny", 2),
        ("tiny", 10),
    ]
    assert find_model(tmp_path, "tiny").name == "10"
    assert find_model(tmp_path, "tiny@2").name == "2"
    with pytest.raises(BundleError, match=r"it holds: tiny@1, tiny@2, tiny@10"):
        find_model(tmp_path, "tiny@3")


def test_reading_a_bundle_imports_neither_torch_nor_numpy():
    code = (
        "import flashbulb_distill.bundle, sys; sys.exit(bool({'torch', 'numpy', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_noise_and_sampler_run_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "from flashbulb_distill.core.noise import draw_noise; from flashbulb_distill.core.sampler import sample; "
        "sample(lambda x, t: x, draw_noise(0, 0, (2,)), (1.0,), prediction='flow', schedule='variance-preserving')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_offered_number_of_steps_has_its_times(tmp_path):
    path = make_tiny_bundle(
        tmp_path, time_steps=(1.0,), step_schedules={4: (1.0, 0.75, 0.5, 0.25), 2: (1.0, 0.5)}
    )
    manifest = open_bundle(path).manifest
    assert manifest.offered_steps == (1, 2, 4)
    assert [manifest.times(steps) for steps in (None, 1, 2)] == [(1.0,), (1.0,), (1.0, 0.5)]
    with pytest.raises(ValueError, match=r"offers \(1, 2, 4\), got 3"):
        manifest.times(3)


@pytest.mark.parametrize("schedules", [{2: (1.0,)}, {1: (0.9,)}, {2: (0.5, 1.0)}, {2: (1.0, 0.0)}, {0: ()}])
def test_a_schedule_that_contradicts_itself_is_refused(tmp_path, schedules):
    with pytest.raises(ValueError, match="step_schedules"):
        make_tiny_bundle(tmp_path, step_schedules=schedules)


def test_padding_may_be_left_out_of_one_text_encoder_alone(tmp_path):
    text = {"tokenizer": "tokenizer.json", "max_length": 14, "padding": "zeros"}
    assert open_bundle(make_tiny_bundle(tmp_path, text=(text,))).manifest.text[0].padding == "zeros"
    with pytest.raises(ValueError, match="one text encoder alone"):
        make_tiny_bundle(tmp_path, version=2, text=(text, text))


def test_a_bundle_of_schema_version_1_is_read_as_it_is(bundle):
    """Version 1 had one text encoder, and none of the fields that came with videos and step schedules."""
    path = bundle / "manifest.json"
    now, fields = open_bundle(bundle).manifest, json.loads(path.read_text())
    (text,) = fields["text"]
    old = {k: v for k, v in fields.items() if k not in ("fps", "step_schedules", "timestep_offset")}
    latent = {k: v for k, v in fields["latent"].items() if k not in ("frame_downscale", "first_frame_alone")}
    del old["manifest_sha256"]
    old |= {"schema_version": 1, "text": text, "latent": latent}
    path.write_text(json.dumps(old | {"manifest_sha256": manifest_digest(old)}, indent=2) + "\n")
    opened = open_bundle(bundle)
    assert [text.tokenizer for text in opened.manifest.text] == ["tokenizer.json"]
    assert opened.manifest == now
    assert opened.sha256 == hash_file(path)


def video(bundle, **changes):
    manifest = open_bundle(bundle).manifest
    fields = manifest.model_dump() | {
        "task": "text-to-video",
        "fps": 8.0,
        "shapes": ({"width": 64, "height": 32, "frames": 9},),
        "latent": {"channels": 16, "downscale": 8, "frame_downscale": 4},
    }
    return Manifest.model_validate(fields | changes)


@pytest.mark.parametrize(("alone", "frames", "latents"), [(True, 9, 3), (False, 16, 4), (True, 1, 1)])
def test_frames_are_latents_with_or_without_a_first_one_alone(alone, frames, latents):
    latent = Latent(channels=16, downscale=8, frame_downscale=4, first_frame_alone=alone)
    assert latent.frames(frames) == latents
    for wrong in (frames + 1, frames + 2, frames + 3, 0):
        with pytest.raises(ValueError, match=f"k frames, got {wrong}"):
            latent.frames(wrong)


def test_latents_have_an_axis_of_frames_in_videos_only(bundle):
    assert open_bundle(bundle).manifest.latent_shape(64, 64) == (64, 8, 8)
    assert video(bundle).latent_shape(64, 32, 9) == (16, 3, 4, 8)
    assert video(bundle).latent_shape(64, 32, 1) == (16, 1, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "fps: expected of a video"),
        ({"task": "text-to-image", "fps": None}, "expected one frame of a picture, got 9"),
        ({"shapes": ({"width": 64, "height": 32, "frames": 10},)}, "expected 1 \\+ 4 k frames, got 10"),
        ({"shapes": ({"width": 60, "height": 32, "frames": 9},)}, "expected multiples of 8, got 60x32"),
    ],
)
def test_shapes_that_no_latents_have_are_refused(bundle, changes, message):
    with pytest.raises(ValueError, match=message):
        video(bundle, **changes)


def test_a_familys_own_noise_levels_survive_the_manifest(bundle):
    betas = Betas(beta_start=0.00085, beta_end=0.012, snr_shift=3.0, zero_terminal_snr=True)
    manifest = video(bundle, schedule=betas, prediction="v", timestep_offset=-1.0)
    write_manifest(bundle, manifest)
    assert open_bundle(bundle).manifest.schedule == betas
