"""Write a student of any family as a bundle: three graphs, checked against torch, tokenizers and manifest.

The text encoders of a family become one graph that joins their embeddings, and what the network reads besides text
(SDXL's picture size, CogVideoX's rotary tables) becomes part of its graph. So a bundle runs alike whatever its family.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bundle import (
    Components,
    Guidance,
    Latent,
    Manifest,
    Shape,
    Text,
    describe_files,
    open_bundle,
    write_manifest,
)
from ..teachers.codec import VaeCodec
from ..teachers.denoiser import Condition, Denoiser
from ..teachers.prompts import PromptEncoder
from .components import export_onnx, save_model
from .draft import draft
from .families import Component, VaeDecoder
from .parity import Parity, check_component
from .positions import exportable

MAX_GRAPH_BYTES = 1_900_000_000  # a protobuf holds 2 GB
PROBES = ("a red dog on a bicycle", "")
_NAMES = ("text_encoder", "denoiser", "decoder")


class DenoiserGraph(nn.Module):
    """denoiser.onnx of a wrapped network; families without pooled embeddings take none."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled: Tensor | None = None
    ) -> Tensor:
        """Run the network once."""
        if pooled is None:
            pooled = prompt_embeds[:, 0, :0]
        return self.denoiser.predict(latents, timestep, Condition(prompt_embeds, pooled))


def student_components(
    denoiser: Denoiser, codec: VaeCodec, prompts: PromptEncoder, shape: Shape
) -> tuple[Component, Component, Component]:
    """Return the three graphs of a student's bundle for one size; the batch alone may vary."""
    ids = prompts.tokenise(PROBES)
    names = ["input_ids", *(f"input_ids_{number}" for number in range(2, len(ids) + 1))]
    cond = prompts.encode(PROBES)
    generator = torch.Generator().manual_seed(0)
    size = codec.latent_shape(shape.width, shape.height, shape.frames)
    latents = torch.randn(len(PROBES), *size, generator=generator)
    last = denoiser.timestep_scale + denoiser.timestep_offset
    network = {
        "latents": latents,
        "timestep": torch.tensor([last, last / 4]),
        "prompt_embeds": cond.tokens,
    }
    if cond.pooled.shape[1]:
        network["pooled_prompt_embeds"] = cond.pooled
    return (
        _component("text_encoder", prompts, dict(zip(names, ids, strict=True)), _TEXT_OUTPUTS),
        _component("denoiser", DenoiserGraph(denoiser), network, ("prediction",)),
        _component("decoder", VaeDecoder(codec.vae), {"latents": latents}, ("pixels",)),
    )


_TEXT_OUTPUTS = ("prompt_embeds", "pooled_prompt_embeds")


def _component(
    name: str, module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]
) -> Component:
    return Component(name, module, inputs, {key: {0: "batch"} for key in inputs}, outputs)


def export_student(
    folder: Path,
    family: str,
    denoiser: Denoiser,
    codec: VaeCodec,
    prompts: PromptEncoder,
    *,
    name: str,
    version: int,
    time_steps: tuple[float, ...],
    shape: Shape,
    guidance: Guidance,
    licence: str,
    fps: float | None = None,
    max_batch: int = 1,
    attribution: str = "",
    parents: Mapping[str, str] | None = None,
    tolerance: float = 1e-3,
) -> list[Parity]:
    """Write a verified bundle of one size to `folder`, which appears whole or not at all.

    Args:
        tolerance: of the parity gate, relative to each output's root mean square.
    Returns:
        What the parity gate measured.
    Raises:
        FileExistsError: `folder` exists; published versions never change.
        ParityError: a graph does not compute what its module does.
        ValueError: what was decided does not fit together, like a picture's shape with several frames; or a network
            has more than a graph file holds, since its weights lie inside.
    """
    if folder.exists():
        raise FileExistsError(
            f"{folder}: expected a new version, but it exists; choose another version or remove it"
        )
    with draft(folder) as work:
        parity = []
        for component in student_components(denoiser, codec, prompts, shape):
            _check_size(component)
            graph = work / f"{component.name}.onnx"
            with exportable():
                save_model(export_onnx(component.module, dict(component.inputs), component.outputs), graph)
            cases = [
                component.inputs,
                {key: value[:1] for key, value in component.inputs.items()},
            ]
            parity.append(check_component(component.name, graph, component.module, cases, tolerance))
        manifest = Manifest(
            schema_version=2,
            name=name,
            version=version,
            task="text-to-video" if codec.is_video else "text-to-image",
            family=family,
            prediction=denoiser.prediction,
            schedule=denoiser.schedule,
            time_steps=time_steps,
            timestep_scale=denoiser.timestep_scale,
            timestep_offset=denoiser.timestep_offset,
            guidance=guidance,
            shapes=(shape,),
            fps=fps,
            max_batch=max_batch,
            latent=Latent(
                channels=codec.channels,
                downscale=codec.downscale,
                frame_downscale=codec.frame_downscale,
                scaling=codec.scaling,
                shift=codec.shift,
            ),
            text=_save_tokenizers(work, prompts),
            dtype="float32",
            components=Components(**{part: f"{part}.onnx" for part in _NAMES}),
            files=describe_files(work),
            parents=dict(parents or {}),
            licence=licence,
            attribution=attribution,
            parity={f"{p.component}_error": p.error for p in parity}
            | {"tolerance": tolerance, "passed": True},
        )
        write_manifest(work, manifest)
        open_bundle(work)
    return parity


def _check_size(component: Component) -> None:
    size = sum(p.numel() * p.element_size() for p in component.module.parameters())
    if size > MAX_GRAPH_BYTES:
        raise ValueError(
            f"{component.name}: expected weights of at most {MAX_GRAPH_BYTES / 1e9:.1f} GB, since they lie inside the "
            f"graph, got {size / 1e9:.1f} GB; export its parts with 'flashbulb export onnx'"
        )


def _save_tokenizers(work: Path, prompts: PromptEncoder) -> Sequence[Text]:
    """Write tokenizer.json, tokenizer_2.json, ... and return how each is used."""
    texts = []
    for number, (tokenizer, length) in enumerate(
        zip(prompts.tokenizers, prompts.lengths, strict=True), start=1
    ):
        name = "tokenizer.json" if number == 1 else f"tokenizer_{number}.json"
        tokenizer.backend_tokenizer.save(str(work / name))
        texts.append(Text(tokenizer=name, max_length=length, pad_id=tokenizer.pad_token_id))
    return tuple(texts)
