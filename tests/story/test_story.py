"""The whole way, once: teacher -> pairs -> ADP -> ADM -> evaluation -> bundle -> queue -> API -> picture."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image
from safetensors.numpy import save_file

from flashbulb_distill.bundle import open_bundle
from flashbulb_distill.evaluate.reference import load_reference
from flashbulb_distill.export.generate import student_images
from flashbulb_distill.run import start_run
from flashbulb_distill.train.recipe import RecipeError, load_recipe
from support.serving import Serving, run_flashbulb
from support.tiny_teacher import make_tiny_teacher

RECIPE = Path(__file__).parents[2] / "distill" / "recipes" / "emoji.yaml"
CONCEPTS = ("red apple", "rocket", "dog face", "star")


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_teacher_becomes_a_student_that_is_served(tmp_path):
    rng = np.random.default_rng(0)
    teacher = make_tiny_teacher(tmp_path / "teacher")
    reference = tmp_path / "reference"
    reference.mkdir()
    labels = [{"concept": c, "style": s, "split": "train"} for c in CONCEPTS for s in ("noto", "twemoji")]
    save_file(
        {"images": rng.integers(0, 256, (len(labels), 64, 64, 3), dtype=np.uint8)},
        reference / "reference.safetensors",
    )
    (reference / "reference.json").write_text(json.dumps(labels))
    assert len(load_reference(reference).labels) == len(labels)
    (tmp_path / "prompts.txt").write_text("\n".join(CONCEPTS) + "\n")

    # Distil.
    overrides = [
        f"teacher={teacher}", f"prompts={tmp_path / 'prompts.txt'}", f"evaluate.reference={reference}",
        "precision=float32", "pairs.count=8", "pairs.num_steps=2", "pairs.batch_size=4",
        "regression.steps=3", "regression.batch_size=4",
        "adp.steps=3", "adp.batch_size=4", "adp.pixel_batch=2", "adp.warmup_steps=1", "adp.taps=[-1,0,1]",
        "adm.steps=3", "adm.batch_size=4", "adm.warmup_steps=1", "adm.taps=[-1,0,1]",
        "evaluate.num_seeds=2", "evaluate.teacher_steps=2", "evaluate.num_components=4", "export.max_batch=4",
    ]  # fmt: skip
    recipe = load_recipe(RECIPE, overrides)
    run = start_run(recipe, tmp_path / "run", resume=False)
    parity = run.export()
    assert {entry.component for entry in parity} == {"text_encoder", "denoiser", "decoder", "pictures"}
    assert all(entry.error < 1e-4 for entry in parity)
    table = (run.out / "evaluation" / "table.md").read_text()
    assert "Style coverage" in table
    assert (run.out / "evaluation" / "grid.png").stat().st_size > 0

    # The bundle traces to its teacher, and a finished run is not repeated nor overwritten.
    bundle = open_bundle(run.bundle_folder)
    assert bundle.manifest.parents["teacher"] == run.teacher_sha256
    assert bundle.manifest.parents["recipe"] == recipe.sha256()
    assert bundle.manifest.batch_invariant == {"onnx": True}
    before = (run.out / "adm" / "student.safetensors").stat().st_mtime_ns
    assert start_run(recipe, tmp_path / "run", resume=True).export() == [], "all of it is done already"
    assert (run.out / "adm" / "student.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match="--resume"):
        start_run(recipe, tmp_path / "run", resume=False)
    with pytest.raises(RecipeError, match=r"a recipe with other adm\.steps"):
        start_run(load_recipe(RECIPE, [*overrides, "adm.steps=4"]), tmp_path / "run", resume=True).adm()

    # Serve it, and ask with the unmodified client.
    models = run.bundle_folder.parents[1]
    with Serving(models, tmp_path / "data") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.images.generate(model="emoji", prompt="red apple", n=2, extra_body={"seed": 7})
        served = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json)))) for image in answer.data
        ]
    assert not np.array_equal(*served)

    # Served, generated without a server, and computed in torch: the same picture.
    made = run_flashbulb(
        "generate",
        "red apple",
        "-o",
        tmp_path / "a.png",
        "--seed",
        "7",
        "--model",
        "emoji",
        "--models",
        models,
    )
    assert made.returncode == 0, made.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), served[0])
    in_torch = student_images(run.teacher, run.student, recipe.time_steps)(["red apple"], [7])[0]
    assert np.abs(in_torch.astype(int) - served[0]).max() <= 1
