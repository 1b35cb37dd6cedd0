"""Write a student as a bundle: diffusers weights, three graphs, tokenizer, manifest; all checked, then put in place."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
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
from ..core.noise import draw_noise
from ..teachers.emoji import TIMESTEP_SCALE, EmojiDenoiser, EmojiTeacher
from ..teachers.text import MAX_LENGTH, model_folder, tokenise
from .components import DecoderComponent, DenoiserComponent, export_onnx, save_model
from .draft import draft
from .measure import Parts, batch_times_ms, is_batch_invariant
from .parity import Parity, check_component
from .weights import quantise_inside, use_safetensors

BACKEND = "onnx"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PROBES = ("red apple", "a rocket, noto style", "", "twemoji emoji of cat face", "\u00e9toile \U0001f31f !")


def export_bundle(
    folder: Path,
    teacher: EmojiTeacher,
    student: EmojiDenoiser,
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
) -> list[Parity]:
    """Write a verified bundle to `folder`, which appears whole or not at all.

    Args:
        tolerance: of the parity gate, relative to each output's root mean square.
    Returns:
        What the parity gate measured.
    Raises:
        FileExistsError: `folder` exists; published versions never change.
        ParityError: an exported graph does not compute what its module does.
    """
    if folder.exists():
        raise FileExistsError(
            f"{folder}: expected a new version, but it exists; choose another version or remove it"
        )
    with draft(folder) as work:
        parity, parts = _write(work, teacher, student, tolerance, max_batch)
        sizes = tuple(2**i for i in range(max_batch.bit_length()) if 2**i <= max_batch)
        channels, side, _ = teacher.latent_shape
        patch = teacher.codec.patch
        manifest = Manifest(
            schema_version=2,
            name=name,
            version=version,
            task="text-to-image",
            family="emoji",
            prediction=student.prediction,
            schedule=student.schedule,
            time_steps=time_steps,
            timestep_scale=TIMESTEP_SCALE,
            guidance=Guidance(mode="baked", scale=guidance),
            shapes=(Shape(width=side * patch, height=side * patch),),
            max_batch=max_batch,
            latent=Latent(channels=channels, downscale=patch),
            text=(Text(tokenizer="tokenizer.json", max_length=MAX_LENGTH),),
            dtype="float32",
            components=Components(
                text_encoder="text_encoder.onnx", denoiser="denoiser.onnx", decoder="decoder.onnx"
            ),
            files=describe_files(work),
            parents=dict(parents),
            licence=licence,
            attribution=attribution,
            metrics=dict(metrics),
            calibration={BACKEND: batch_times_ms(parts, sizes)},
            batch_invariant={BACKEND: is_batch_invariant(parts, (*sizes, max_batch))},
            parity={f"{p.component}_error": p.error for p in parity}
            | {"tolerance": tolerance, "passed": True},
        )
        write_manifest(work, manifest)
        open_bundle(work)
    return parity


def _write(
    work: Path, teacher: EmojiTeacher, student: EmojiDenoiser, tolerance: float, max_batch: int
) -> tuple[list[Parity], Parts]:
    """Write weights and graphs; return the parity of each, and inputs of `max_batch` rows to measure them with."""
    # What is exported is what was stored: the weights go through float16 first, and come back.
    student.transformer.half().save_pretrained(work / "transformer")
    student.transformer.float()
    teacher.codec.half().save_pretrained(work / "codec")
    teacher.codec.float()
    shutil.copyfile(model_folder() / "tokenizer.json", work / "tokenizer.json")

    modules = component_cases(teacher, student)
    _, text_in = modules["text_encoder"]
    denoiser_module, denoiser_in = modules["denoiser"]
    decoder_module, decoder_in = modules["decoder"]

    text = export_onnx(teacher.text_encoder, text_in, ["prompt_embeds", "pooled_prompt_embeds"])
    matrices = {n: p.numpy() for n, p in teacher.text_encoder.named_parameters() if p.ndim == 2}
    quantise_inside(text, matrices)
    save_model(text, work / "text_encoder.onnx")

    denoiser = export_onnx(denoiser_module, denoiser_in, ["prediction"])
    use_safetensors(denoiser, work, f"transformer/{WEIGHTS}")
    save_model(denoiser, work / "denoiser.onnx")

    decoder = export_onnx(decoder_module, decoder_in, ["pixels"])
    use_safetensors(decoder, work, f"codec/{WEIGHTS}")
    save_model(decoder, work / "decoder.onnx")

    parity = []
    parts: dict[str, tuple[Path, dict[str, NDArray[Any]]]] = {}
    for component, (module, case) in modules.items():
        path = work / f"{component}.onnx"
        parity.append(check_component(component, path, module, batches(case), tolerance))
        rows = np.arange(max_batch) % len(PROBES)
        parts[component] = path, {name: value.numpy()[rows] for name, value in case.items()}
    return parity, parts


def component_cases(
    teacher: EmojiTeacher, student: EmojiDenoiser
) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Return each component as the module that is exported, and the inputs that it is traced and checked with."""
    ids, mask = tokenise(teacher.tokenizer, PROBES)
    with torch.no_grad():
        tokens, pooled = teacher.text_encoder(ids, mask)
    latents = torch.from_numpy(np.stack([draw_noise(0, i, teacher.latent_shape) for i in range(len(PROBES))]))
    timestep = torch.linspace(1, TIMESTEP_SCALE, len(PROBES))
    timestep[0] = TIMESTEP_SCALE
    text_in = {"input_ids": ids, "attention_mask": mask}
    denoiser_in = {
        "latents": latents,
        "timestep": timestep,
        "prompt_embeds": tokens,
        "pooled_prompt_embeds": pooled,
    }
    return {
        "text_encoder": (teacher.text_encoder, text_in),
        "denoiser": (DenoiserComponent(student.transformer), denoiser_in),
        "decoder": (DecoderComponent(teacher.codec), {"latents": latents}),
    }


def batches(case: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """The case whole, and its first row alone: the batch axis must be dynamic."""
    return [case, cast(Mapping[str, Tensor], {name: value[:1] for name, value in case.items()})]
