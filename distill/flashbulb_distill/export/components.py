"""The three exported components as modules with positional tensors, and their export to ONNX.

Weights stay in the bundle's safetensors files, in diffusers layout: the denoiser's and the decoder's graphs point
into them as external data, so that an export cannot drift from the weights that it came with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import onnx
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from ..teachers.patch_codec import PatchCodec

OPSET = 18


class DenoiserComponent(nn.Module):
    """denoiser.onnx: latents, timestep [b] (0 to 1000), prompt_embeds, pooled_prompt_embeds -> prediction."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled: Tensor) -> Tensor:
        """Run the network once."""
        out = self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return cast(Tensor, out)


class DecoderComponent(nn.Module):
    """decoder.onnx: latents -> pixels clamped to [-1, 1]."""

    def __init__(self, codec: PatchCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, latents: Tensor) -> Tensor:
        """Decode."""
        return self.codec.decode(latents).clamp(-1, 1)


def export_onnx(module: nn.Module, inputs: dict[str, Tensor], output_names: Sequence[str]) -> onnx.ModelProto:
    """Export a module of positional tensors with a dynamic batch axis, the weights inside."""
    batch = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        module.eval(),
        tuple(inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=list(output_names),
        dynamic_shapes=tuple({0: batch} for _ in inputs),
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _strip(model)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter noted about its own run: source paths and traces, which differ between machines."""
    del model.metadata_props[:]
    model.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    del model.graph.metadata_props[:]
    for function in model.functions:
        del function.metadata_props[:]


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model as one file and check it, and that the external data which it names is there."""
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path)
