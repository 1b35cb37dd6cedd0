"""`flashbulb export onnx` on diffusers folders."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from flashbulb_distill.export import pipeline
from flashbulb_distill.export.external import place_weights
from flashbulb_distill.export.graph import networks_of, trace_graph
from flashbulb_service.cli import run
from support.exported import find
from support.tiny_families import make_tiny_family

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def save_folder(root, names):
    """Save some parts of a tiny SDXL as its pipeline would, in several files each."""
    entries = {
        "_class_name": "StableDiffusionXLPipeline",
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    parts = make_tiny_family("sdxl")
    for name in names:
        parts[name].save_pretrained(root / name, max_shard_size="20KB")
        entries[name] = [type(parts[name]).__module__.partition(".")[0], type(parts[name]).__name__]
    (root / "model_index.json").write_text(json.dumps(entries))
    return root


def store_behind(folder, *prefixes):
    """Store every tensor of a part in one file, once behind each prefix."""
    tensors = {}
    for file in [*folder.glob("*.safetensors")]:
        tensors |= load_file(file)
        file.unlink()
    for index in folder.glob("*.index.json"):
        index.unlink()
    stored = {f"{prefix}{name}": value.clone() for prefix in prefixes for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def test_graphs_lie_beside_sharded_weights_and_agree_with_torch(tmp_path, capsys):
    folder = save_folder(tmp_path, ["text_encoder", "text_encoder_2"])
    assert len(list((folder / "text_encoder_2").glob("*.safetensors"))) > 1
    assert run(["export", "onnx", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        str(folder / "text_encoder.onnx"),
        str(folder / "text_encoder_2.onnx"),
    ]
    assert all("differs from torch by" in line for line in lines)
    files = {
        entry.value
        for tensor in onnx.load(folder / "text_encoder_2.onnx", load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert len(files) > 1


def test_graph_of_another_dtype_casts_what_is_stored(tmp_path, capsys):
    folder = save_folder(tmp_path, ["text_encoder"])
    assert run(["export", "onnx", str(folder), "--dtype", "float16"]) == 0
    assert "differs from torch" in capsys.readouterr().out
    types = {
        tensor.data_type
        for tensor in onnx.load(folder / "text_encoder.onnx", load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert types == {onnx.TensorProto.FLOAT}


def test_weights_that_are_stored_behind_a_prefix_are_found(tmp_path, capsys):
    """Published SDXL has text_model.embeddings.* where transformers 5 calls it embeddings.*: none was found."""
    folder = save_folder(tmp_path, ["text_encoder"])
    store_behind(folder / "text_encoder", "text_model.")
    assert run(["export", "onnx", str(folder)]) == 0
    assert "differs from torch" in capsys.readouterr().out


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_weights_that_are_links_are_refused_before_anything_is_traced(tmp_path, capsys, monkeypatch, link):
    """A snapshot of the hub's cache links into blobs/: that was a traceback of onnx.checker, after all the tracing."""
    folder = save_folder(tmp_path / "snapshot", ["text_encoder"])
    file = max(folder.glob("text_encoder/*.safetensors"))
    link(file, file.rename(tmp_path / "blob"))
    monkeypatch.setattr(pipeline, "trace_graph", lambda *_, **__: pytest.fail("traced"))
    capsys.readouterr()  # progress of saving
    assert run(["export", "onnx", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{file}: expected a file of its own, found a link" in error and "cp -rL" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no model_index.json"),
        ('{"_class_name": "FluxPipeline"}', "expected one of StableDiffusionXLPipeline"),
    ],
)
def test_a_folder_that_is_no_pipeline_of_ours_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    assert run(["export", "onnx", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_weights_that_are_missing_are_named(tmp_path):
    component = find("sdxl", "text_encoder")
    graph = trace_graph(component)
    (network,) = networks_of(component).values()
    with pytest.raises(ValueError, match=r"expected \*\.safetensors files, found none"):
        place_weights(graph, component, {network: tmp_path}, tmp_path)
    save_file({"other": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected .*weight of shape .* found none"):
        place_weights(graph, component, {network: tmp_path}, tmp_path)
    name = next(iter(network.state_dict()))
    save_file({name: torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected .*weight of shape .* found"):
        place_weights(graph, component, {network: tmp_path}, tmp_path)
    network.save_pretrained(tmp_path)
    store_behind(tmp_path, "text_model.", "teacher.")
    with pytest.raises(ValueError, match=r"expected .*weight of shape .* found none"):
        place_weights(graph, component, {network: tmp_path}, tmp_path)
