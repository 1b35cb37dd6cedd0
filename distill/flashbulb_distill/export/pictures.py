"""Whole pictures drawn twice: by a bundle's graphs, as its manifest says, and by torch, as the student's class says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from torch import Tensor

from ..bundle import Bundle
from ..core.noise import draw_noise
from ..core.sampler import sample
from ..teachers.denoiser import Condition, Denoiser
from .families import Component
from .generate import Images, draw_images, to_images
from .parity import ParityError, open_session

# Pictures of 8-bit levels: rounding moves a few values by one level (measured: see
# docs/export.md); another schedule, prediction or scaling moves all of them.
MIN_PSNR_DB = 45.0
MIN_SSIM = 0.999
EQUAL_DB = 200.0  # what a manifest says of equal pictures, whose ratio is infinite


@dataclass(frozen=True)
class TorchStudent:
    """A student in torch beside its graphs.

    Args:
        components: text encoder, denoiser and decoder, whose inputs are those of the probe prompts.
        cond: of the probe prompts.   decode: latents to pixels.   latent_shape: of one picture or clip.
    """

    components: tuple[Component, Component, Component]
    denoiser: Denoiser
    decode: Callable[[Tensor], Tensor]
    cond: Condition
    latent_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pictures:
    """How pictures compare: all of them together, and the pair that is least alike."""

    psnr_db: float
    ssim: float


def compare_pictures(bundle: Bundle, student: TorchStudent) -> Pictures:
    """Draw the probes by both and compare.

    Besides the student's own time steps, two steps are tried, since one step alone does not see the schedule.

    Raises:
        ParityError: they differ by more than rounding.
    """
    seeds = list(range(len(student.cond)))
    worst_psnr, worst_ssim = EQUAL_DB, 1.0
    first = bundle.manifest.time_steps[0]
    for steps in dict.fromkeys((bundle.manifest.time_steps, (first, first / 2))):
        expected = draw_images(
            student.denoiser, student.decode, student.cond, student.latent_shape, steps, seeds
        )
        arrived = bundle_images(bundle, student.components[0].inputs, steps, seeds)
        if expected.shape != arrived.shape:
            raise ParityError(
                f"pictures: expected the shape {expected.shape}, got {arrived.shape}; "
                "the manifest does not describe this student"
            )
        worst_psnr = min(worst_psnr, psnr(expected, arrived))
        worst_ssim = min(worst_ssim, ssim(expected, arrived))
    if not (worst_psnr >= MIN_PSNR_DB and worst_ssim >= MIN_SSIM):
        raise ParityError(
            f"pictures: expected at least {MIN_PSNR_DB:g} dB and an SSIM of {MIN_SSIM:g} beside torch, got "
            f"{worst_psnr:.1f} dB and {worst_ssim:.4f}; the manifest does not describe this student"
        )
    return Pictures(worst_psnr, worst_ssim)


def bundle_images(
    bundle: Bundle, text: Mapping[str, Tensor], time_steps: Sequence[float], seeds: list[int]
) -> Images:
    """Draw pictures by a bundle's graphs, as its manifest says: uint8 [n, h, w, 3], of videos [n, f, h, w, 3].

    Args:
        text: inputs of the text encoder, a row a picture.
    """
    manifest = bundle.manifest
    encoder, network, decoder = (
        open_session(bundle.file(name))
        for name in (
            manifest.components.text_encoder,
            manifest.components.denoiser,
            manifest.components.decoder,
        )
    )
    embeds, pooled = encoder.run(
        ["prompt_embeds", "pooled_prompt_embeds"], {name: value.numpy() for name, value in text.items()}
    )
    latent, shape = manifest.latent, manifest.shapes[0]
    size = manifest.latent_shape(shape.width, shape.height, shape.frames)
    takes = {node.name for node in network.get_inputs()}

    def noise(step: int) -> NDArray[np.float32]:
        return np.stack([draw_noise(seed, 0, size, step) for seed in seeds])

    def denoise(xt: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        inputs = {
            "latents": xt.astype(np.float32),
            "timestep": np.full(len(xt), t * manifest.timestep_scale + manifest.timestep_offset, np.float32),
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
        }
        out: NDArray[np.float32] = network.run(
            None, {name: value for name, value in inputs.items() if name in takes}
        )[0]
        return out

    with np.errstate(all="ignore"):  # what is not finite is refused below
        latents = sample(
            denoise,
            noise(0),
            time_steps,
            prediction=manifest.prediction,
            schedule=manifest.schedule,
            renoise=noise,
        )
    scaled = np.asarray(latents, np.float32) / np.float32(latent.scaling) + np.float32(latent.shift)
    if not np.isfinite(scaled).all():
        raise ParityError(
            f"pictures: expected finite latents, got others with prediction {manifest.prediction!r} and schedule "
            f"{manifest.schedule!r}; the manifest does not describe this student"
        )
    return to_images(torch.from_numpy(decoder.run(None, {"latents": scaled})[0]))


def psnr(a: Images, b: Images) -> float:
    """Return the peak signal-to-noise ratio of 8-bit pictures in dB; infinite where they are equal."""
    mean = float(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64))))
    return float("inf") if mean == 0 else float(10 * np.log10(255.0**2 / mean))


def ssim(a: Images, b: Images) -> float:
    """Return the smallest structural similarity of pairs of pictures or frames [..., h, w, 3], in windows of 7 by 7.

    Wang, Bovik, Sheikh and Simoncelli 2004, equation 13, with uniform windows, K1 = 0.01 and K2 = 0.03.
    """
    x, y = (pictures.reshape(-1, *pictures.shape[-3:]).astype(np.float64) for pictures in (a, b))
    window = (1, 7, 7, 1)
    mean_x, mean_y = uniform_filter(x, window), uniform_filter(y, window)
    var_x = uniform_filter(x * x, window) - mean_x**2
    var_y = uniform_filter(y * y, window) - mean_y**2
    cov = uniform_filter(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (
        (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    )
    return float(index.mean(axis=(1, 2, 3)).min())
