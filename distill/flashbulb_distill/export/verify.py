"""Hold a bundle against torch again: its graphs, and whole pictures drawn as its manifest says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from ..bundle import Bundle, open_bundle
from ..core.noise import draw_noise
from ..core.sampler import sample
from ..teachers.emoji import EmojiTeacher, load_emoji_teacher
from ..teachers.text import tokenise
from .bundle import PROBES, batches, component_cases
from .generate import Images, student_images, to_images
from .parity import Parity, ParityError, check_component, open_session

# Pictures of 8-bit levels: rounding moves a few values by one level (measured: see
# docs/export.md); another schedule, prediction or scaling moves all of them.
MIN_PSNR_DB = 45.0
MIN_SSIM = 0.999


def verify_bundle(path: Path) -> list[Parity]:
    """Compare every graph of a bundle with torch on the bundle's own weights, then whole pictures.

    Returns:
        what was measured; [] where the bundle holds no weights that torch could load.
    Raises:
        BundleError: a file is not what the manifest says.
        ParityError: a graph or a picture differs from torch.
    """
    bundle = open_bundle(path)
    if not (bundle.manifest.family == "emoji" and (path / "transformer" / "config.json").is_file()):
        return []
    teacher = load_emoji_teacher(path)  # a bundle has the layout of a teacher's folder
    names = bundle.manifest.components.model_dump()
    tolerance = float(bundle.manifest.parity.get("tolerance", 1e-4))
    found = [
        check_component(component, bundle.file(names[component]), module, batches(case), tolerance)
        for component, (module, case) in component_cases(teacher, teacher.denoiser).items()
    ]
    return [*found, *compare_pictures(bundle, teacher)]


def compare_pictures(bundle: Bundle, teacher: EmojiTeacher) -> list[Parity]:
    """Draw pictures by the graphs, as the manifest says, and by torch, as the student's class says.

    Besides the student's own time steps, two steps are tried, since one step alone does not see the schedule.

    Raises:
        ParityError: they differ by more than rounding.
    """
    seeds = list(range(len(PROBES)))
    worst_psnr, worst_ssim = float("inf"), 1.0
    first = bundle.manifest.time_steps[0]
    for steps in dict.fromkeys((bundle.manifest.time_steps, (first, first / 2))):
        expected = student_images(teacher, teacher.denoiser, steps)([*PROBES], seeds)
        arrived = bundle_images(bundle, teacher, steps, seeds)
        worst_psnr = min(worst_psnr, psnr(expected, arrived))
        worst_ssim = min(worst_ssim, ssim(expected, arrived))
    if not (worst_psnr >= MIN_PSNR_DB and worst_ssim >= MIN_SSIM):
        raise ParityError(
            f"pictures: expected at least {MIN_PSNR_DB:g} dB and an SSIM of {MIN_SSIM:g} beside torch, got "
            f"{worst_psnr:.1f} dB and {worst_ssim:.4f}; the manifest does not describe this student"
        )
    return [Parity("pictures", 1 - worst_ssim, 1 - MIN_SSIM)]


def bundle_images(
    bundle: Bundle, teacher: EmojiTeacher, time_steps: Sequence[float], seeds: list[int]
) -> Images:
    """Draw the probes' pictures by a bundle's graphs, as its manifest says: uint8 [n, h, w, 3]."""
    import torch

    manifest = bundle.manifest
    text, network, decoder = (
        open_session(bundle.file(name))
        for name in (
            manifest.components.text_encoder,
            manifest.components.denoiser,
            manifest.components.decoder,
        )
    )
    ids, mask = tokenise(teacher.tokenizer, PROBES)
    embeds, pooled = text.run(
        ["prompt_embeds", "pooled_prompt_embeds"],
        {"input_ids": ids.numpy(), "attention_mask": mask.numpy()},
    )
    latent, shape = manifest.latent, manifest.shapes[0]
    size = manifest.latent_shape(shape.width, shape.height, 1)

    def noise(step: int) -> NDArray[np.float32]:
        return np.stack([draw_noise(seed, 0, size, step) for seed in seeds])

    def denoise(xt: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        inputs = {
            "latents": xt.astype(np.float32),
            "timestep": np.full(len(xt), t * manifest.timestep_scale + manifest.timestep_offset, np.float32),
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
        }
        out: NDArray[np.float32] = network.run(None, inputs)[0]
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
    """Return the smallest structural similarity of pairs of pictures [n, h, w, 3], in windows of 7 by 7.

    Wang, Bovik, Sheikh and Simoncelli 2004, equation 13, with uniform windows, K1 = 0.01 and K2 = 0.03.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
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
