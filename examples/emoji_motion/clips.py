"""Draw clips with the teacher, and put them on a contact sheet."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flashbulb_distill.core.sampler import sample_ode
from flashbulb_distill.teachers.clip_codec import ClipCodec
from flashbulb_distill.teachers.denoiser import Condition, guided_x0
from flashbulb_distill.teachers.emoji_motion import MotionDenoiser


@torch.no_grad()
def sample_clips(
    denoiser: MotionDenoiser,
    codec: ClipCodec,
    noise: torch.Tensor,
    cond: Condition,
    uncond: Condition,
    *,
    num_steps: int,
    guidance: float,
) -> np.ndarray:
    """Draw clips from noise [n, c, 4, 4, 4] by DDIM with guidance: uint8 [n, frames, h, w, 3]."""

    def denoise(xt: torch.Tensor, t: float) -> torch.Tensor:
        return guided_x0(denoiser, xt, torch.full((len(xt),), t), cond, uncond, guidance)

    x0 = sample_ode(denoise, noise, num_steps, prediction="x0", schedule=denoiser.schedule)
    pixels = (codec.decode(x0).clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().movedim(1, -1).numpy()


def save_sheet(path: Path, clips: np.ndarray) -> None:
    """Write a picture with a clip a row, every second frame of it, each pixel doubled."""
    rows = np.concatenate([np.concatenate(list(clip[::2]), axis=1) for clip in clips])
    picture = Image.fromarray(rows)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)
