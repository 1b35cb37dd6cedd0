"""An export reads shapes, not weights: a network of 16 GB that was never filled becomes a graph over its files."""

import json
import resource
import struct
from dataclasses import replace

import onnx
import pytest
import torch
from diffusers import SD3Transformer2DModel

from flashbulb_distill.export.external import place_weights
from flashbulb_distill.export.families import component_of
from flashbulb_distill.export.graph import save_graph, trace_graph

MAX_GROWTH = 1e9  # bytes of memory that the tracer itself may take


def write_hollow_weights(network, path):
    """Write a safetensors file whose tensors are a hole in the disk; return their bytes."""
    header, end = {}, 0
    for name, tensor in network.state_dict().items():
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_export_takes_no_memory_for_weights(tmp_path):
    """SD3.5's flags at eight times SD3's width: reading, copying or folding any large part of it would show."""
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            attention_head_dim=64,
            num_attention_heads=192,
            joint_attention_dim=4096,
            caption_projection_dim=192 * 64,
            pooled_projection_dim=2048,
            pos_embed_max_size=24,
            qk_norm="rms_norm",
        )
    weight_bytes = write_hollow_weights(network, tmp_path / "model.safetensors")
    assert weight_bytes > 16e9
    component = component_of("sd3", "transformer", network)
    component = replace(
        component, inputs={name: value.to("meta") for name, value in component.inputs.items()}
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    graph = trace_graph(component)
    place_weights(graph, component, {network: tmp_path}, tmp_path)
    save_graph(graph, tmp_path / "model.onnx")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < MAX_GROWTH, f"{grown / 1e9:.2f} GB for weights of {weight_bytes / 1e9:.1f} GB"
    assert (tmp_path / "model.onnx").stat().st_size < 2e6
    placed = [
        tensor
        for tensor in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    lengths = sum(
        int(entry.value) for tensor in placed for entry in tensor.external_data if entry.key == "length"
    )
    assert lengths > 0.9 * weight_bytes
