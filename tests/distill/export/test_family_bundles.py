"""A bundle of every family draws through the service's backend what its networks draw in torch."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from diffusers import DiffusionPipeline

from flashbulb_distill.bundle import (
    BundleError,
    Guidance,
    Shape,
    describe_files,
    open_bundle,
    write_manifest,
)
from flashbulb_distill.core.noise import draw_noise
from flashbulb_distill.core.sampler import sample
from flashbulb_distill.export.families import Component
from flashbulb_distill.export.parity import ParityError
from flashbulb_distill.export.student import export_student
from flashbulb_distill.export.verify import verify_bundle
from flashbulb_distill.teachers.load import open_source
from flashbulb_service.backends import ImageRequest
from flashbulb_service.backends.onnx import OnnxBackend
from flashbulb_service.images import to_uint8
from support.tiny_pipelines import make_tiny_pipeline

WIDTH, HEIGHT, FRAMES = 64, 32, 9  # not square: an exchanged axis shows

TIME_STEPS = {"sdxl": (1.0,), "cogvideox": (1.0, 0.5)}  # 4 of SD3's, below
PROMPTS = ["a red dog", "", "red " * 300]


@torch.no_grad()
def torch_latents(source, requests, times):
    denoiser = source.denoiser()
    cond = source.prompts().encode([request.prompt for request in requests])
    shape = source.codec().latent_shape(WIDTH, HEIGHT, FRAMES)

    def noise(step):
        return torch.from_numpy(np.stack([draw_noise(r.seed, r.index, shape, step) for r in requests]))

    return sample(
        lambda xt, t: denoiser(xt, torch.full((len(xt),), t, dtype=torch.float64), cond),
        noise(0),
        times,
        prediction=denoiser.prediction,
        schedule=denoiser.schedule,
        renoise=noise,
    )


def export(folder, source, times, **changes):
    """Write the teacher as if it were a student of these times."""
    is_video = source.family == "cogvideox"
    options = {
        "name": f"tiny-{source.family}",
        "version": 1,
        "time_steps": times,
        "shape": Shape(width=WIDTH, height=HEIGHT, frames=FRAMES if is_video else 1),
        "guidance": Guidance(mode="none"),
        "licence": "Apache-2.0",
        "max_batch": 4,
        "fps": 8.0 if is_video else None,
    }
    parts = source.denoiser(), source.codec(), source.prompts()
    export_student(folder, source.family, *parts, **options | changes)
    return open_bundle(folder)


@pytest.mark.timeout(600)  # exports, which a busy machine makes slow
@pytest.mark.parametrize("family", ["sdxl", "sd35-large", "cogvideox-5b"])
def test_the_services_backend_draws_what_torch_draws(family, tmp_path):
    source = open_source(make_tiny_pipeline(tmp_path / "teacher", family))
    times = TIME_STEPS.get(source.family, (1.0, 0.9, 0.75, 0.5))
    bundle = export(tmp_path / "bundle", source, times)
    backend = OnnxBackend(threads=1)
    backend.load(bundle)
    frames = bundle.manifest.shapes[0].frames
    requests = [
        ImageRequest(prompt, seed, 0, WIDTH, HEIGHT, frames=frames) for seed, prompt in enumerate(PROMPTS)
    ]
    latents = backend.denoise(requests, backend.encode_prompts(PROMPTS))
    expected = torch_latents(source, requests, times)
    size = float(expected.square().mean().sqrt())
    error = np.abs(latents - expected.numpy()).max() / size
    assert error < 1e-3, f"{family}: relative error {error}"
    pictures = backend.decode(latents)
    with torch.no_grad():
        wanted = to_uint8(source.codec().decode(expected).numpy())
    assert pictures.shape == wanted.shape
    assert pictures.shape[-3:] == (HEIGHT, WIDTH, 3)
    assert wanted.std() > 1
    assert np.abs(pictures.astype(int) - wanted.astype(int)).max() <= 1
    alone = backend.denoise(requests[1:2], backend.encode_prompts(PROMPTS[1:2]))
    np.testing.assert_allclose(alone[0], latents[1], atol=1e-4 * size)
    check_what_verify_says(bundle.path)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "times"), [("sdxl", (1.0,)), ("sd3", (1.0, 0.9, 0.5))])
def test_diffusers_own_pipeline_draws_from_the_bundles_folder_what_the_service_draws(
    family, times, tmp_path, monkeypatch
):
    source = open_source(make_tiny_pipeline(tmp_path / "teacher", family))
    bundle = export(tmp_path / "bundle", source, times)
    backend = OnnxBackend(threads=1)
    backend.load(bundle)
    request = ImageRequest("a red dog", 3, 0, WIDTH, HEIGHT)
    served = backend.decode(backend.denoise([request], backend.encode_prompts(["a red dog"])))[0]
    shape = source.codec().latent_shape(WIDTH, HEIGHT)
    fresh = iter([torch.from_numpy(draw_noise(3, 0, shape, step))[None] for step in range(1, 9)])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor", lambda *args, **options: next(fresh)
    )
    pipeline = DiffusionPipeline.from_pretrained(bundle.path)
    pipeline.set_progress_bar_config(disable=True)
    # As docs/export.md says that a student's folder is called.
    steps = {"num_inference_steps": 1} if family == "sdxl" else {"sigmas": list(times)}
    drawn = pipeline(
        "a red dog",
        guidance_scale=1.0,
        width=WIDTH,
        height=HEIGHT,
        latents=torch.from_numpy(draw_noise(3, 0, shape))[None],
        output_type="np",
        **steps,
    ).images[0]
    assert served.std() > 1
    assert np.abs(np.rint(drawn * 255).astype(int) - served.astype(int)).max() <= 1


def check_what_verify_says(path):
    """A bundle holds against its own weights; one weight that a graph has otherwise does not, behind right hashes."""
    manifest = open_bundle(path).manifest
    assert manifest.parity["pictures_psnr_db"] >= 45 and 0.999 <= manifest.parity["pictures_ssim"] <= 1
    assert [p.component for p in verify_bundle(path)] == ["text_encoder", "denoiser", "decoder", "pictures"]
    assert weights_inside(path) == []
    graph = path / "denoiser.onnx"
    model = onnx.load(graph)
    weight = next(t for t in model.graph.initializer if t.name.endswith("proj_out.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] += 0.05 * np.abs(values).max()
    bare = onnx.load(graph, load_external_data=False)
    place = next(t for t in bare.graph.initializer if t.name == weight.name)
    place.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    graph.write_bytes(bare.SerializeToString(deterministic=True))
    with pytest.raises(BundleError, match=r"denoiser\.onnx: expected"):
        verify_bundle(path)
    (path / "manifest.json").unlink()
    write_manifest(path, manifest.model_copy(update={"files": describe_files(path)}))
    with pytest.raises(ParityError, match=r"denoiser: expected ONNX Runtime within 0\.001"):
        verify_bundle(path)


def weights_inside(path):
    """Name the floating numbers that lie inside the graphs and are as many as a weight's; masks are not."""
    return [
        tensor.name
        for graph in path.glob("*.onnx")
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
        and tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        and np.prod(tensor.dims) > 512
    ]


class Drifted(torch.nn.Module):
    """A decoder that is another one when it is traced: a planted fault."""

    def forward(self, latents):
        return latents * (1.01 if torch.compiler.is_exporting() else 1.0)


@pytest.mark.timeout(300)
def test_a_graph_that_drifted_from_its_network_makes_no_bundle(tmp_path, monkeypatch):
    source = open_source(make_tiny_pipeline(tmp_path / "teacher", "sd3"))
    inputs = {"latents": torch.ones(2, 3)}
    drifted = Component("decoder", Drifted(), inputs, {"latents": {0: "batch"}}, ("pixels",))
    monkeypatch.setattr(
        "flashbulb_distill.export.student.torch_student",
        lambda *parts: SimpleNamespace(components=(drifted,)),
    )
    with pytest.raises(ParityError, match="decoder: expected ONNX Runtime within"):
        export(tmp_path / "bundle", source, (1.0,))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"], "a bundle or a part of one was left"
