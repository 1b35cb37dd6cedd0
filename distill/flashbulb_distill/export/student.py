"""Write a student of any family as a bundle: three graphs over its diffusers folder, checked against torch, a manifest.

The text encoders of a family become one graph that joins their embeddings, and what the network reads besides text
(SDXL's picture size, CogVideoX's rotary tables) becomes part of its graph. So a bundle runs alike whatever its family.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle import (
    Bundle,
    Components,
    Guidance,
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
from ..train.recipe import MAX_TOLERANCE
from .draft import draft
from .external import place_weights
from .families import Component, VaeDecoder
from .folder import save_student
from .graph import save_graph, trace_graph
from .parity import TEXT_OUTPUTS, Case, Parity, check_component
from .pictures import MIN_SSIM, TorchStudent, compare_pictures

PROBES = ("a red dog on a bicycle", "")


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


def torch_student(denoiser: Denoiser, codec: VaeCodec, prompts: PromptEncoder, shape: Shape) -> TorchStudent:
    """Return a student of one size with the modules behind its three graphs; the batch alone may vary."""
    ids = prompts.tokenise(PROBES)
    names = ["input_ids", *(f"input_ids_{number}" for number in range(2, len(ids) + 1))]
    cond = prompts.encode(PROBES)
    size = codec.latent_shape(shape.width, shape.height, shape.frames)
    latents = torch.randn(len(PROBES), *size, generator=torch.Generator().manual_seed(0))
    last = denoiser.timestep_scale + denoiser.timestep_offset
    network = {
        "latents": latents,
        "timestep": torch.tensor([last, last / 4]),
        "prompt_embeds": cond.tokens,
    }
    if cond.pooled.shape[1]:
        network["pooled_prompt_embeds"] = cond.pooled
    components = (
        batched("text_encoder", prompts, dict(zip(names, ids, strict=True)), TEXT_OUTPUTS),
        batched("denoiser", DenoiserGraph(denoiser), network, ("prediction",)),
        batched("decoder", VaeDecoder(codec.vae), {"latents": latents}, ("pixels",)),
    )
    return TorchStudent(components, denoiser, codec.decode, cond, size)


def batched(
    name: str,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    axes: Mapping[int, str] = MappingProxyType({0: "batch"}),
) -> Component:
    """Return a component of which the batch alone may vary, or these axes of every input."""
    return Component(name, module, inputs, dict.fromkeys(inputs, axes), outputs)


def batches(component: Component) -> list[Case]:
    """Return the inputs whole, and their first row alone: the batch axis must be dynamic."""
    return [component.inputs, {name: value[:1] for name, value in component.inputs.items()}]


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
    tolerance: float = MAX_TOLERANCE,
) -> list[Parity]:
    """Write a verified bundle of one size to `folder`, which appears whole or not at all.

    Beside the graphs lies the student as a diffusers folder: the graphs hold no weights, they name its files.

    Args:
        tolerance: of the parity gate, relative to each output's root mean square; `verify_bundle` allows no more.
    Returns:
        What the parity gate measured.
    Raises:
        FileExistsError: `folder` exists; published versions never change.
        ParityError: a graph does not compute what its module does, or the bundle draws other pictures than torch.
        ValueError: what was decided does not fit together, like a picture's shape with several frames.
    """
    refuse_existing(folder)
    with draft(folder) as work, _in_the_weights_type(denoiser):
        folders = save_student(work, denoiser, codec, prompts)
        student = torch_student(denoiser, codec, prompts, shape)
        parity = []
        for component in student.components:
            path = work / f"{component.name}.onnx"
            graph = trace_graph(component)
            place_weights(graph, component, folders, work)
            save_graph(graph, path)
            parity.append(
                check_component(component.name, path, component.module, batches(component), tolerance)
            )
        manifest = describe_student(
            work,
            denoiser,
            name=name,
            version=version,
            task="text-to-video" if codec.is_video else "text-to-image",
            family=family,
            time_steps=time_steps,
            guidance=guidance,
            shapes=(shape,),
            fps=fps,
            max_batch=max_batch,
            latent=codec.latent,
            text=_texts(prompts),
            parents=dict(parents or {}),
            licence=licence,
            attribution=attribution,
        )
        return seal(work, manifest, parity, tolerance, student)


def refuse_existing(folder: Path) -> None:
    """Raise FileExistsError if there is a bundle already."""
    if folder.exists():
        raise FileExistsError(
            f"{folder}: expected a new version, but it exists; choose another version or remove it"
        )


def describe_student(work: Path, denoiser: Denoiser, **fields: Any) -> Manifest:
    """Return the manifest of what lies in `work`; `fields` are those that neither network nor files say."""
    return Manifest(
        schema_version=2,
        prediction=denoiser.prediction,
        schedule=denoiser.schedule,
        timestep_scale=denoiser.timestep_scale,
        timestep_offset=denoiser.timestep_offset,
        dtype="float32",
        components=Components(
            text_encoder="text_encoder.onnx", denoiser="denoiser.onnx", decoder="decoder.onnx"
        ),
        files=describe_files(work),
        **fields,
    )


def seal(
    work: Path, manifest: Manifest, parity: Sequence[Parity], tolerance: float, student: TorchStudent
) -> list[Parity]:
    """Compare whole pictures, write what all comparisons found into the manifest, and check the hashes.

    Returns:
        the parity of graphs and pictures.
    Raises:
        ParityError: the pictures differ by more than rounding.
    """
    pictures = compare_pictures(Bundle(work, manifest, sha256=""), student)
    measured = {f"{p.component}_error": p.error for p in parity} | {
        "tolerance": tolerance,
        "pictures_psnr_db": pictures.psnr_db,
        "pictures_ssim": pictures.ssim,
        "passed": True,
    }
    write_manifest(work, manifest.model_copy(update={"parity": measured}))
    open_bundle(work)
    return [*parity, Parity("pictures", 1 - pictures.ssim, 1 - MIN_SSIM)]


@contextmanager
def _in_the_weights_type(denoiser: Denoiser) -> Iterator[None]:
    """Turn a student's autocast off: a graph computes in the type of its weights."""
    network: Any = denoiser
    bf16 = network.bf16
    network.bf16 = False
    try:
        yield
    finally:
        network.bf16 = bf16


def _texts(prompts: PromptEncoder) -> tuple[Text, ...]:
    """Say how each tokenizer is used; they lie in tokenizer/, tokenizer_2/ and on."""
    numbered = enumerate(zip(prompts.tokenizers, prompts.lengths, strict=True), start=1)
    return tuple(
        Text(
            tokenizer=f"tokenizer{'' if number == 1 else f'_{number}'}/tokenizer.json",
            max_length=length,
            pad_id=tokenizer.pad_token_id,
        )
        for number, (tokenizer, length) in numbered
    )
