"""Write a student of the demo families as a bundle: diffusers weights, three graphs, tokenizer, manifest; checked."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..bundle import Guidance, Latent, Shape, Text
from ..core.noise import draw_noise
from ..teachers.clip_codec import ClipCodec
from ..teachers.cogvideox import CogVideoXDenoiser
from ..teachers.demo import DemoTeacher
from ..teachers.emoji import NOISE_CODE, EmojiDenoiser
from ..teachers.sd3 import Sd3Denoiser
from ..teachers.text import MAX_LENGTH, model_folder, tokenise
from .draft import draft
from .external import place_weights
from .folder import forget_origin
from .graph import save_graph, trace_graph
from .measure import Parts, batch_times_ms, is_batch_invariant
from .parity import TEXT_OUTPUTS, Parity, check_component, check_padding
from .pictures import TorchStudent
from .student import (
    DenoiserGraph,
    batched,
    batches,
    describe_student,
    refuse_existing,
    seal,
)
from .weights import hold_inside

BACKEND = "onnx"
PROBES = {
    "emoji": (
        "red apple",
        "a rocket, noto style",
        "",
        "twemoji emoji of cat face",
        "\u00e9toile \U0001f31f !",
    ),
    "emoji-motion": ("rocket flying up", "a red apple bouncing", "", "\u00e9toile \U0001f31f !"),
}
DemoStudent = Sd3Denoiser | CogVideoXDenoiser


def export_bundle(
    folder: Path,
    family: str,
    teacher: DemoTeacher[Any, Any],
    student: DemoStudent,
    *,
    name: str,
    version: int,
    time_steps: tuple[float, ...],
    guidance: float,
    max_batch: int,
    parents: Mapping[str, str],
    metrics: Mapping[str, float],
    licence: str,
    attribution: str,
    tolerance: float,
    fps: float | None = None,
) -> list[Parity]:
    """Write a verified bundle to `folder`, which appears whole or not at all.

    Args:
        tolerance: of the parity gate, relative to each output's root mean square.
    Returns:
        What the parity gate measured.
    Raises:
        FileExistsError: `folder` exists; published versions never change.
        ParityError: a graph does not compute what its module does, or the bundle draws other pictures than torch.
    """
    refuse_existing(folder)
    with draft(folder) as work:
        in_torch = torch_demo(family, teacher, student)
        parity, parts = _write(work, teacher, student, in_torch, tolerance, max_batch)
        sizes = tuple(2**i for i in range(max_batch.bit_length()) if 2**i <= max_batch)
        shape, latent = _sizes(teacher)
        manifest = describe_student(
            work,
            student,
            name=name,
            version=version,
            task="text-to-image" if fps is None else "text-to-video",
            family=family,
            time_steps=time_steps,
            guidance=Guidance(mode="baked", scale=guidance),
            shapes=(shape,),
            fps=fps,
            max_batch=max_batch,
            latent=latent,
            text=(Text(tokenizer="tokenizer.json", max_length=MAX_LENGTH, padding="zeros"),),
            parents=dict(parents),
            licence=licence,
            attribution=attribution,
            metrics=dict(metrics),
            calibration={BACKEND: batch_times_ms(parts, sizes, num_steps=len(time_steps))},
            batch_invariant={BACKEND: is_batch_invariant(parts, (*sizes, max_batch))},
        )
        return seal(work, manifest, parity, tolerance, in_torch)


class DecoderGraph(nn.Module):
    """decoder.onnx: latents -> pixels clamped to [-1, 1]."""

    def __init__(self, codec: nn.Module) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, latents: Tensor) -> Tensor:
        """Decode."""
        pixels: Tensor = self.codec.decode(latents)  # type: ignore[operator]
        return pixels.clamp(-1, 1)


def _sizes(teacher: DemoTeacher[Any, Any]) -> tuple[Shape, Latent]:
    """Return the one size of a family's pictures or clips, and how its latents relate to it."""
    codec = teacher.codec
    if isinstance(codec, ClipCodec):
        channels, frames, height, width = teacher.latent_shape
        span, patch, _ = codec.size
        latent = Latent(channels=channels, downscale=patch, frame_downscale=span, first_frame_alone=False)
        return Shape(width=width * patch, height=height * patch, frames=frames * span), latent
    channels, height, width = teacher.latent_shape
    patch = codec.patch
    return Shape(width=width * patch, height=height * patch), Latent(channels=channels, downscale=patch)


def _write(
    work: Path,
    teacher: DemoTeacher[Any, Any],
    student: DemoStudent,
    in_torch: TorchStudent,
    tolerance: float,
    max_batch: int,
) -> tuple[list[Parity], Parts]:
    """Write weights and graphs; return the parity of each, and inputs of `max_batch` rows to measure them with."""
    # What is exported is what was stored: the weights go through float16 first, and come back.
    networks: dict[str, Any] = {"transformer": student.transformer, "codec": teacher.codec}
    if isinstance(student, EmojiDenoiser) and student.code is not None:
        networks[NOISE_CODE] = student.code
    for name, network in networks.items():
        forget_origin(network)
        network.half().save_pretrained(work / name)
        network.float()
    shutil.copyfile(model_folder() / "tokenizer.json", work / "tokenizer.json")
    folders: dict[nn.Module, Path] = {network: work / name for name, network in networks.items()}
    inside = {name: p.detach().numpy() for name, p in teacher.text_encoder.state_dict().items()}

    parity = []
    parts: dict[str, tuple[Path, dict[str, NDArray[Any]]]] = {}
    for component in in_torch.components:
        path = work / f"{component.name}.onnx"
        graph = trace_graph(component)
        if component.name == "text_encoder":  # its package has the weights, and nobody should need it to draw
            hold_inside(graph, inside)
        else:
            place_weights(graph, component, folders, work)
        save_graph(graph, path)
        parity.append(check_component(component.name, path, component.module, batches(component), tolerance))
        if component.name == "text_encoder":
            check_padding(path, component.inputs, tolerance)
        rows = np.arange(max_batch) % len(in_torch.cond)
        feeds = {name: value.numpy()[rows] for name, value in component.inputs.items()}
        if component.name == "text_encoder":  # as a worker runs it: without padding that all prompts have
            longest = feeds["attention_mask"].sum(1).max()
            feeds = {name: value[:, :longest] for name, value in feeds.items()}
        parts[component.name] = (path, feeds)
    return parity, parts


def torch_demo(family: str, teacher: DemoTeacher[Any, Any], student: DemoStudent) -> TorchStudent:
    """Return a student with the modules behind its three graphs, and inputs to trace and check them with."""
    probes = PROBES[family]
    ids, mask = tokenise(teacher.tokenizer, probes)
    cond = teacher.encode(probes)
    latents = torch.from_numpy(np.stack([draw_noise(0, i, teacher.latent_shape) for i in range(len(probes))]))
    timestep = torch.linspace(1, student.timestep_scale, len(probes))
    timestep[0] = student.timestep_scale
    denoiser_in = {"latents": latents, "timestep": timestep, "prompt_embeds": cond.tokens}
    if isinstance(student, Sd3Denoiser):
        denoiser_in["pooled_prompt_embeds"] = cond.pooled
    text_in = {"input_ids": ids, "attention_mask": mask}
    components = (
        batched("text_encoder", teacher.text_encoder, text_in, TEXT_OUTPUTS, {0: "batch", 1: "text"}),
        batched("denoiser", DenoiserGraph(student), denoiser_in, ("prediction",)),
        batched("decoder", DecoderGraph(teacher.codec), {"latents": latents}, ("pixels",)),
    )
    return TorchStudent(components, student, teacher.codec.decode, cond, teacher.latent_shape)
