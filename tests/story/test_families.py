"""Teachers of the families that people own go the whole way: `distill run` with the shipped recipe, and the backend."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from flashbulb_distill.bundle import open_bundle
from flashbulb_distill.export.generate import student_images
from flashbulb_distill.export.verify import verify_bundle
from flashbulb_distill.run import start_run
from flashbulb_distill.train.recipe import load_recipe
from flashbulb_service.backends import ImageRequest
from flashbulb_service.backends.onnx import OnnxBackend
from support.tiny_pipelines import make_tiny_pipeline
from support.tiny_teacher import make_tiny_motion_teacher

RECIPES = Path(__file__).parents[2] / "distill" / "recipes"
PROMPTS = ["a red dog", "red"]
SIZE = ["precision=float32", "variant=null", "adm.steps=2", "adm.batch_size=2", "adm.warmup_steps=1"]
IMAGE = ["shape.width=64", "shape.height=64", "adm.taps=[-1,0,1]"]
VIDEO = ["shape.width=64", "shape.height=64", "shape.frames=9", "adm.taps=[-1,1]"]
ADP = [
    "pairs.count=4", "pairs.num_steps=2", "pairs.batch_size=2",
    "adp.steps=2", "adp.batch_size=2", "adp.warmup_steps=1", "adp.taps=[-1,0,1]",
    "adp.pixel_batch=2", "adp.pixel_size=64",
]  # fmt: skip
CASES = {
    "sdxl": ("sdxl_1step", [*IMAGE, *ADP]),
    "sd3": ("sd3_medium_4step", IMAGE),
    "sd35-large": ("sd35_large_4step", IMAGE),
    "cogvideox-2b": ("cogvideox_2b_8step", VIDEO),
    "cogvideox-5b": ("cogvideox_5b_8step", VIDEO),
    "sd3, as the recipe says in bfloat16": ("sd3_medium_4step", [*IMAGE, "precision=bfloat16"]),
}


def paths_of(origin, bundle):
    """Return the files of a bundle that name a folder of this machine."""
    return [path for path in bundle.rglob("*.json") if str(origin) in path.read_text()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_video_demos_teacher_becomes_a_bundle_of_clips(tmp_path):
    teacher = make_tiny_motion_teacher(tmp_path / "teacher")
    rng = np.random.default_rng(0)
    for split, motion in (("train", "growing"), ("held-out", "flying up")):
        clips = rng.integers(0, 255, (2, 4, 16, 32, 32, 3), dtype=np.uint8)
        save_file({"clips": clips}, tmp_path / f"{split}.safetensors")
        labels = [{"subject": subject, "motion": motion} for subject in ("rocket", "star")]
        (tmp_path / f"{split}.json").write_text(json.dumps(labels))
    (tmp_path / "prompts.txt").write_text("rocket growing\nstar growing\n")
    overrides = [
        f"teacher={teacher}", f"prompts={tmp_path / 'prompts.txt'}", f"evaluate.reference={tmp_path}",
        "adm.steps=2", "adm.batch_size=2", "adm.warmup_steps=1", "adm.taps=[-1,0,1]",
        "evaluate.num_seeds=2", "evaluate.teacher_steps=2", "evaluate.num_components=3", "export.max_batch=2",
    ]  # fmt: skip
    recipe = load_recipe(RECIPES / "emoji_motion.yaml", overrides)
    run = start_run(recipe, tmp_path / "run", resume=False)
    assert {entry.component for entry in run.export()} >= {"text_encoder", "denoiser", "decoder", "pictures"}
    assert "Motion as asked" in (run.out / "evaluation" / "table.md").read_text()
    bundle = open_bundle(run.bundle_folder)
    assert bundle.manifest.metrics.keys() == {"motion_correct_of_teacher", "subject_correct_of_teacher"}
    assert bundle.manifest.batch_invariant == {"onnx": True}
    backend = OnnxBackend(threads=1)
    backend.load(bundle)
    prompts = ["rocket growing", "star growing"]
    requests = [ImageRequest(prompt, seed, 0, 32, 32, frames=16) for seed, prompt in enumerate(prompts)]
    drawn = backend.decode(backend.denoise(requests, backend.encode_prompts(prompts)))
    wanted = student_images(run.teacher, run.student, recipe.time_steps)(prompts, [0, 1])
    assert drawn.shape == wanted.shape == (2, 16, 32, 32, 3)
    assert wanted.std() > 1
    assert np.abs(drawn.astype(int) - wanted.astype(int)).max() <= 1
    assert len(verify_bundle(run.bundle_folder)) == 4
    assert not paths_of(tmp_path, run.bundle_folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_a_teacher_that_people_own_becomes_a_bundle_that_the_service_draws_with(case, tmp_path):
    name, overrides = CASES[case]
    teacher = make_tiny_pipeline(tmp_path / "teacher", case.partition(",")[0])
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    inputs = [f"teacher={teacher}", f"prompts={tmp_path / 'prompts.txt'}"]
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*inputs, *SIZE, *overrides])
    run = start_run(recipe, tmp_path / "run", resume=False)
    parity = run.export()
    assert {entry.component for entry in parity} >= {"text_encoder", "denoiser", "decoder"}

    # Every stage trained, and the student moved away from its teacher.
    for stage in recipe.stages:
        lines = (run.out / stage / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["student_norm"] > 0, stage
    taught = dict(run.teacher.new_denoiser(bf16=False).named_parameters())
    assert any(not value.equal(taught[key]) for key, value in run.student.named_parameters())

    assert not paths_of(tmp_path, run.bundle_folder)

    # The bundle says what it was made from, and draws by the service's backend what the student draws in torch.
    bundle = open_bundle(run.bundle_folder)
    manifest, shape = bundle.manifest, bundle.manifest.shapes[0]
    assert manifest.parents.keys() >= {"teacher", "recipe", *recipe.stages}
    assert manifest.time_steps == recipe.time_steps
    backend = OnnxBackend(threads=1)
    backend.load(bundle)
    requests = [
        ImageRequest(prompt, seed, 0, shape.width, shape.height, frames=shape.frames)
        for seed, prompt in enumerate(PROMPTS)
    ]
    drawn = backend.decode(backend.denoise(requests, backend.encode_prompts(PROMPTS)))
    # A bundle's text encoders are in float32, whatever those of the training were.
    exact = replace(run.teacher, source=replace(run.teacher.source, dtype=torch.float32), embeddings=None)
    wanted = student_images(exact, run.student, recipe.time_steps)(PROMPTS, [0, 1])
    assert drawn.shape == wanted.shape
    assert wanted.std() > 1, "a picture of one colour would prove nothing"
    assert np.abs(drawn.astype(int) - wanted.astype(int)).max() <= 1
