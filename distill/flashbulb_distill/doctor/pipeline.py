"""Diffusers' own pipeline around networks that are loaded already: the reference that the wrappers must equal.

Pipelines are imported where they are used: it takes seconds, and prints. Text encoders are left out: the pipeline gets
our embeddings, and `teachers.prompts` is tested elsewhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.times import ode_times
from ..teachers.cogvideox import CogVideoXDenoiser
from ..teachers.denoiser import Condition, Denoiser
from ..teachers.sd3 import Sd3Denoiser
from ..teachers.sdxl import SdxlDenoiser


@dataclass(frozen=True)
class Call:
    """One call that a pipeline made of its network: latents and times as our wrapper takes them, and the output."""

    xt: Tensor
    timestep: Tensor
    out: Tensor


@dataclass(frozen=True)
class Trajectory:
    """The clean latents that a pipeline made, and the calls of its network on the way."""

    latents: Tensor
    calls: tuple[Call, ...]


def has_pipeline(denoiser: Denoiser) -> bool:
    """Tell whether diffusers has a pipeline that samples this network; subclasses may read outputs otherwise."""
    return type(denoiser) in _RUNS


@torch.no_grad()
def run_pipeline(
    denoiser: Denoiser,
    vae: nn.Module,
    scheduler: Mapping[str, Any],
    noise: Tensor,
    cond: Condition,
    uncond: Condition,
    *,
    num_steps: int,
    guidance: float,
) -> Trajectory:
    """Sample by diffusers' pipeline from unit noise [b, c, ...], at equally spaced times.

    Args:
        scheduler: the teacher's configuration. Of SDXL's choices it is run as DDIM, which is what we integrate.
        cond: [b] rows.   uncond: one row.
    """
    build = _RUNS[type(denoiser)]
    pipeline, network, options = build(denoiser, vae, scheduler, noise, num_steps)
    pipeline.set_progress_bar_config(disable=True)
    calls: list[Call] = []
    is_video = noise.ndim == 5

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        xt = args[0] if args else kwargs["hidden_states"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        out = output[0]
        if is_video:
            xt, out = xt.transpose(1, 2), out.transpose(1, 2)
        calls.append(Call(xt.clone(), timestep.expand(len(xt)).clone(), out.clone()))

    handle = network.register_forward_hook(keep, with_kwargs=True)
    dtype = next(network.parameters()).dtype
    empty = uncond.expand(len(cond))
    embeddings = {
        "prompt_embeds": cond.tokens.to(dtype),
        "negative_prompt_embeds": empty.tokens.to(dtype),
    }
    if cond.pooled.shape[-1] > 0:
        embeddings |= {
            "pooled_prompt_embeds": cond.pooled.to(dtype),
            "negative_pooled_prompt_embeds": empty.pooled.to(dtype),
        }
    try:
        made = pipeline(
            **embeddings,
            **options,
            guidance_scale=guidance,
            num_inference_steps=num_steps,
            latents=(noise.transpose(1, 2) if is_video else noise).to(dtype),
            output_type="latent",
        )
    finally:
        handle.remove()
    latents = made.frames.transpose(1, 2) if is_video else made.images
    return Trajectory(latents.float(), tuple(calls))


Built = tuple[Any, nn.Module, dict[str, Any]]
# What we integrate, whatever the folder says: published SDXL ends at its first noise level (set_alpha_to_one false).
_TO_CLEAN = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}


def _size(noise: Tensor, vae: Any) -> dict[str, int]:
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    return {"height": noise.shape[-2] * scale, "width": noise.shape[-1] * scale}


def _sdxl(
    denoiser: Denoiser, vae: nn.Module, scheduler: Mapping[str, Any], noise: Tensor, num_steps: int
) -> Built:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    network = cast(SdxlDenoiser, denoiser).unet
    ddim = DDIMScheduler.from_config({**scheduler, **_TO_CLEAN})
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=network,
        scheduler=ddim,
        add_watermarker=False,
    )
    return pipeline, network, _size(noise, vae)


def _sd3(
    denoiser: Denoiser, vae: nn.Module, scheduler: Mapping[str, Any], noise: Tensor, num_steps: int
) -> Built:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    network = cast(Sd3Denoiser, denoiser).transformer
    pipeline = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(dict(scheduler)),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    # Equal steps from pure noise; diffusers' own list starts elsewhere. The scheduler shifts them.
    return pipeline, network, _size(noise, vae) | {"sigmas": list(ode_times(num_steps))[:-1]}


def _cogvideox(
    denoiser: Denoiser, vae: nn.Module, scheduler: Mapping[str, Any], noise: Tensor, num_steps: int
) -> Built:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    network = cast(CogVideoXDenoiser, denoiser).transformer
    pipeline = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=network,
        scheduler=CogVideoXDDIMScheduler.from_config({**scheduler, **_TO_CLEAN}),
    )
    frames = (noise.shape[2] - 1) * int(cast(Any, vae).config.temporal_compression_ratio) + 1
    return pipeline, network, _size(noise, vae) | {"num_frames": frames}


_RUNS: dict[type[Denoiser], Callable[..., Built]] = {
    SdxlDenoiser: _sdxl,
    Sd3Denoiser: _sd3,
    CogVideoXDenoiser: _cogvideox,
}
