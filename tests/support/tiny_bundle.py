"""A real student bundle with random weights, small enough to be made anew by each test; needs no torch."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flashbulb_distill.bundle import (
    Components,
    Guidance,
    Latent,
    Manifest,
    Shape,
    Text,
    describe_files,
    write_manifest,
)

LENGTH, WIDTH, CHANNELS, SIDE = 14, 384, 64, 8
FRAMES, FPS = 6, 4.0  # of the video student: one and a half seconds
WORDS = ("red", "green", "blue", "apple", "heart", "rocket", "dog", "a")


def make_tiny_bundle(
    folder: Path, *, name: str = "tiny", version: int = 1, is_video: bool = False, **fields: object
) -> Path:
    """Write a bundle to `folder`/name/version and return that path; equal arguments give equal bytes.

    is_video: the graphs take latents with frames. fields: of the manifest, in place of those of a one-step student.
    """
    path = folder / name / str(version)
    path.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(version))
    _save(_text_encoder(rng), path / "text_encoder.onnx")
    _save(_denoiser(rng, is_video), path / "denoiser.onnx")
    _save(_decoder(rng, is_video), path / "decoder.onnx")
    (path / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    files = describe_files(path)
    given: dict[str, object] = {
        "schema_version": 2,
        "name": name,
        "version": version,
        "task": "text-to-image",
        "family": "emoji",
        "prediction": "x0",
        "schedule": "rectified-flow",
        "time_steps": (1.0,),
        "timestep_scale": 1000.0,
        "guidance": Guidance(mode="baked", scale=2.0),
        "shapes": (Shape(width=64, height=64),),
        "max_batch": 8,
        "latent": Latent(channels=CHANNELS, downscale=8),
        "text": (Text(tokenizer="tokenizer.json", max_length=LENGTH),),
        "dtype": "float32",
        "components": Components(
            text_encoder="text_encoder.onnx", denoiser="denoiser.onnx", decoder="decoder.onnx"
        ),
        "files": files,
        "licence": "Apache-2.0",
    }
    manifest = Manifest.model_validate(given | fields)
    write_manifest(path, manifest)
    return path


def make_tiny_video_bundle(folder: Path, *, name: str = "tiny-video", **fields: object) -> Path:
    """Write a student of four steps that makes videos of 64x64 pixels and 6 frames; otherwise as above."""
    given: dict[str, object] = {
        "task": "text-to-video",
        "family": "cogvideox",
        "time_steps": (1.0, 0.75, 0.5, 0.25),
        "shapes": (Shape(width=64, height=64, frames=FRAMES),),
        "fps": FPS,
    }
    return make_tiny_bundle(folder, name=name, is_video=True, **given | fields)


def _tensor(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _constant(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(value, name)


def _save(graph: onnx.GraphProto, path: Path) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _text_encoder(rng: np.random.Generator) -> onnx.GraphProto:
    """Embeddings are rows of a table, zeros for padding, and pooled a LENGTH-th of their sum: any length will do."""
    table = rng.standard_normal((len(WORDS) + 2, WIDTH), dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask2"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask2", "last"], ["mask"]),
        helper.make_node("Mul", ["rows", "mask"], ["prompt_embeds"]),
        helper.make_node("ReduceSum", ["prompt_embeds", "one"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "share"], ["pooled_prompt_embeds"]),
    ]
    constants = [
        _constant("table", table),
        _constant("last", np.array([2], dtype=np.int64)),
        _constant("one", np.array([1], dtype=np.int64)),
        _constant("share", np.array(1 / LENGTH, dtype=np.float32)),
    ]
    inputs = [
        _tensor("input_ids", ["b", "l"], TensorProto.INT64),
        _tensor("attention_mask", ["b", "l"], TensorProto.INT64),
    ]
    outputs = [_tensor("prompt_embeds", ["b", "l", WIDTH]), _tensor("pooled_prompt_embeds", ["b", WIDTH])]
    return helper.make_graph(nodes, "text_encoder", inputs, outputs, constants)


def _denoiser(rng: np.random.Generator, is_video: bool) -> onnx.GraphProto:
    """prediction = tanh(latents + W pooled + mean of prompt_embeds + timestep / 1000), so that all inputs matter."""
    weight = rng.standard_normal((WIDTH, CHANNELS), dtype=np.float32) / WIDTH**0.5
    nodes = [
        helper.make_node("MatMul", ["pooled_prompt_embeds", "weight"], ["bias2"]),
        helper.make_node("Unsqueeze", ["bias2", "plane"], ["bias"]),
        helper.make_node("ReduceMean", ["prompt_embeds", "both"], ["level"], keepdims=0),
        helper.make_node("Mul", ["timestep", "milli"], ["t"]),
        helper.make_node("Add", ["level", "t"], ["shift1"]),
        helper.make_node("Unsqueeze", ["shift1", "channel_plane"], ["shift"]),
        helper.make_node("Add", ["latents", "bias"], ["biased"]),
        helper.make_node("Add", ["biased", "shift"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["prediction"]),
    ]
    constants = [
        _constant("weight", weight),
        _constant("plane", np.arange(2, 4 + is_video)),
        _constant("channel_plane", np.arange(1, 4 + is_video)),
        _constant("both", np.array([1, 2], dtype=np.int64)),
        _constant("milli", np.array(0.001, dtype=np.float32)),
    ]
    shape = _latent_shape(is_video)
    inputs = [
        _tensor("latents", shape),
        _tensor("timestep", ["b"]),
        _tensor("prompt_embeds", ["b", LENGTH, WIDTH]),
        _tensor("pooled_prompt_embeds", ["b", WIDTH]),
    ]
    return helper.make_graph(nodes, "denoiser", inputs, [_tensor("prediction", shape)], constants)


def _decoder(rng: np.random.Generator, is_video: bool) -> onnx.GraphProto:
    frame = [1] if is_video else []
    weight = rng.standard_normal((CHANNELS, 3, *frame, 8, 8), dtype=np.float32) / CHANNELS**0.5
    nodes = [
        helper.make_node("ConvTranspose", ["latents", "weight"], ["raw"], strides=[*frame, 8, 8]),
        helper.make_node("Tanh", ["raw"], ["pixels"]),
    ]
    shape = _latent_shape(is_video)
    pixels: list[int | str] = ["b", 3, *shape[2:-2], 64, 64]
    return helper.make_graph(
        nodes,
        "decoder",
        [_tensor("latents", shape)],
        [_tensor("pixels", pixels)],
        [_constant("weight", weight)],
    )


def _latent_shape(is_video: bool) -> list[int | str]:
    return ["b", CHANNELS, *(["f"] if is_video else []), SIDE, SIDE]


def _tokenizer() -> dict[str, object]:
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {word: index + 2 for index, word in enumerate(WORDS)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
