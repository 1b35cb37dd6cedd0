"""A student's weights as a diffusers folder, which is part of its bundle: what its graphs read and torch can load."""

from pathlib import Path
from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchLCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..bundle import Betas
from ..teachers.codec import VaeCodec
from ..teachers.cogvideox import CogVideoXDenoiser
from ..teachers.denoiser import Denoiser
from ..teachers.prompts import CogVideoXPrompts, PromptEncoder, Sd3Prompts, SdxlPrompts
from ..teachers.sd3 import Sd3Denoiser
from ..teachers.sdxl import SdxlDenoiser

SHARD = "1GB"
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def save_student(
    folder: Path, denoiser: Denoiser, codec: VaeCodec, prompts: PromptEncoder
) -> dict[nn.Module, Path]:
    """Write a student as `teachers.load.open_source` and `DiffusionPipeline.from_pretrained` read it.

    Returns:
        where each network lies.
    Raises:
        ValueError: the parts are not of one family, or predict what the family's scheduler cannot say.
    """
    pipeline = _pipeline(denoiser, codec, prompts)
    for part in pipeline.components.values():
        forget_origin(part)
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD)
    return {part: folder / name for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def forget_origin(part: Any) -> None:
    """Make a network, tokenizer or scheduler forget the folder it was loaded from, which its configuration names."""
    if isinstance(part, ConfigMixin):
        part.register_to_config(_name_or_path="")
    elif isinstance(part, PreTrainedModel):
        part.config.name_or_path = ""
    elif isinstance(part, PreTrainedTokenizerBase):
        part.name_or_path = ""
        part.init_kwargs.pop("name_or_path", None)


def _pipeline(denoiser: Denoiser, codec: VaeCodec, prompts: PromptEncoder) -> DiffusionPipeline:
    vae = codec.vae
    if isinstance(denoiser, SdxlDenoiser) and isinstance(prompts, SdxlPrompts):
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=prompts.clip_l,
            text_encoder_2=prompts.clip_g,
            tokenizer=prompts.tokenizers[0],
            tokenizer_2=prompts.tokenizers[1],
            unet=denoiser.unet,
            # Not re-noised between steps: the same as our sampler for one step only, see docs/export.md.
            scheduler=DDIMScheduler(
                **_noise_levels(denoiser),
                timestep_spacing="trailing",
                clip_sample=False,
                set_alpha_to_one=True,
            ),
            force_zeros_for_empty_prompt=prompts.zero_uncond,
            add_watermarker=False,
        )
    if isinstance(denoiser, Sd3Denoiser) and isinstance(prompts, Sd3Prompts):
        if denoiser.prediction != "flow":
            raise ValueError(f"expected a student of SD3 that predicts flow, got {denoiser.prediction!r}")
        return StableDiffusion3Pipeline(
            transformer=denoiser.transformer,
            scheduler=FlowMatchLCMScheduler(shift=1.0),  # a student's times are told outright
            vae=vae,
            text_encoder=prompts.clip_l,
            tokenizer=prompts.tokenizers[0],
            text_encoder_2=prompts.clip_g,
            tokenizer_2=prompts.tokenizers[1],
            text_encoder_3=prompts.t5,
            tokenizer_3=prompts.tokenizers[2],
        )
    if isinstance(denoiser, CogVideoXDenoiser) and isinstance(prompts, CogVideoXPrompts):
        levels = _noise_levels(denoiser)
        assert isinstance(denoiser.schedule, Betas)
        return CogVideoXPipeline(
            tokenizer=prompts.tokenizers[0],
            text_encoder=prompts.t5,
            vae=vae,
            transformer=denoiser.transformer,
            scheduler=CogVideoXDDIMScheduler(
                **levels,
                snr_shift_scale=denoiser.schedule.snr_shift,
                timestep_spacing="trailing",
                clip_sample=False,
            ),
        )
    raise ValueError(
        f"expected denoiser and text encoders of one family, got {type(denoiser).__name__} and {type(prompts).__name__}"
    )


def _noise_levels(denoiser: Denoiser) -> dict[str, Any]:
    """Say a denoiser's schedule and prediction as diffusers' schedulers do; `teachers.load.betas_of` reads it."""
    schedule = denoiser.schedule
    if not isinstance(schedule, Betas) or denoiser.prediction not in _PREDICTIONS:
        raise ValueError(
            f"expected discrete noise levels and a prediction of {', '.join(_PREDICTIONS)}, got {schedule!r} and "
            f"{denoiser.prediction!r}"
        )
    return {
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "num_train_timesteps": schedule.num_timesteps,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "prediction_type": _PREDICTIONS[denoiser.prediction],
    }
