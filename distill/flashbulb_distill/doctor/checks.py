"""The doctor's checks. Each is a function of the subject that says what it found, or raises what is wrong.

They need no training and no data: prompts, noise, and a few samples of the teacher.
"""

import copy

import torch
from torch import Tensor

from ..core.schedule import Prediction, Schedule, add_noise, alpha_sigma, ode_step, to_eps, to_x0
from ..pairs.generate import sample_teacher
from ..teachers.codec import VaeCodec
from ..teachers.denoiser import Denoiser, guided_x0, join, read_x0, spread
from .pipeline import Trajectory, has_pipeline, run_pipeline
from .subject import Subject

PIPELINE_STEPS = 4
TRAJECTORY_TOLERANCE = 1e-3  # of the latents' size; measured on tiny networks: below 2e-4
# Of bfloat16's own distance from float32: GPUs convolve float32 in TF32, of three bits more, so an eighth is expected.
TF32_SHARE = 1 / 4
ROUND_TRIP_TOLERANCE = 1e-4
MIXED_TOLERANCE = 0.05  # of the estimate's size
DTYPE_TOLERANCE = 0.15  # of the output's size; measured: bfloat16 is 0.5 to 4 % off
# Of the data's spread: what is further off says less than the data's mean. At t = 1 of SDXL, sigma / alpha = 14.6 makes
# .15 of an output that is 1 % off, so that less would refuse right teachers.
ESTIMATE_TOLERANCE = 1.0
LATENT_STD = (0.4, 2.5)
CODEC_ERROR = 0.35  # of the latents' standard deviation; measured: 0.17 on the emoji teacher
CONTRAST = (0.05, 0.95)  # standard deviation of pixels in [-1, 1]
CLIPPED = 0.5  # share of pixels beyond [-1.05, 1.05]
TIMES = (0.001, 0.02, 0.25, 0.5, 0.75, 0.98, 1.0)


class Fault(Exception):
    """A check found something wrong; the message says what, and what to do."""


class NotApplicable(Exception):
    """A check has nothing to look at; the message says why."""


@torch.no_grad()
def wrapper(subject: Subject) -> str:
    """Compare our wrapper with diffusers' network as its own pipeline calls it: every output bit for bit."""
    denoiser, vae = _with_pipeline(subject)
    both = join(subject.uncond, subject.cond.take(torch.tensor([0])))
    found = _trajectory(subject, denoiser, vae)
    worst = 0.0
    for call in found.calls:
        ours = denoiser.predict(call.xt.float(), call.timestep.float(), both)
        worst = max(worst, float((ours - call.out.float()).abs().max()))
    if worst > 0:
        raise Fault(
            f"our output differs from diffusers' by up to {worst:.2e} on the same input; "
            "time, size, text or rotary conditions are not what the pipeline gives"
        )
    return f"{len(found.calls)} outputs equal to diffusers' pipeline, bitwise"


@torch.no_grad()
def convention(subject: Subject) -> str:
    """Compare a whole guided sampling with diffusers' pipeline: noise levels, time steps, prediction, guidance.

    In float32, where there is memory for it: what bfloat16 rounds is as large as what a wrong time shift moves.
    """
    denoiser, vae = _with_pipeline(subject)
    ours, theirs = _ends(subject, denoiser, vae)
    tolerance = TRAJECTORY_TOLERANCE
    if _dtype(denoiser) != torch.float32:
        rounded = theirs
        try:
            ours, theirs = _ends(subject, copy.deepcopy(denoiser).float(), vae)
            tolerance = max(tolerance, TF32_SHARE * _relative(rounded, theirs))
        except torch.OutOfMemoryError:  # training needs no such copy
            tolerance = DTYPE_TOLERANCE
    error = _relative(ours, theirs)
    if not error <= tolerance:
        raise Fault(
            f"{PIPELINE_STEPS} guided steps end {error:.1%} away from diffusers' pipeline (at most {tolerance:.1%}); "
            "prediction type, noise schedule, time shift or guidance is not the scheduler's"
        )
    return (
        f"{PIPELINE_STEPS} steps at guidance {_guidance(subject):g} end {error:.1e} from diffusers' pipeline"
    )


def round_trips(subject: Subject) -> str:
    """Turn known clean latents and noise into what the network would say, and read it back, at all times."""
    schedule, prediction = subject.denoiser.schedule, subject.denoiser.prediction
    x_0, eps = subject.noise(2), subject.normal("round-trip", 2)
    worst = 0.0
    for t in TIMES[1:-1]:
        xt = add_noise(schedule, x_0, eps, t)
        x0_hat = to_x0(prediction, schedule, perfect_output(prediction, schedule, x_0, eps, t), xt, t)
        worst = max(worst, _relative(x0_hat, x_0), _relative(to_eps(schedule, x0_hat, xt, t), eps))
        s = t - 0.01
        worst = max(worst, _relative(ode_step(schedule, x0_hat, xt, t, s), add_noise(schedule, x_0, eps, s)))
    if not worst <= ROUND_TRIP_TOLERANCE:
        raise Fault(
            f"{prediction} under {_name(schedule)} does not read back: off by {worst:.1e} of its size; "
            "prediction and schedule do not fit each other"
        )
    return f"{prediction} to x0, eps and along the flow: off by {worst:.1e} at most"


@torch.no_grad()
def denoising(subject: Subject) -> str:
    """Noise the teacher's own samples half way: its estimate must beat the best guess that reads no content."""
    latents = subject.samples
    cond = subject.cond.take(torch.arange(len(latents)) % len(subject.cond))
    t = torch.full((len(latents),), 0.5, device=subject.device)
    xt = add_noise(subject.denoiser.schedule, latents, subject.normal("denoise", len(latents)), 0.5)
    error = float((subject.denoiser.x0(xt, t, cond) - latents).square().mean())
    alpha, sigma = alpha_sigma(subject.denoiser.schedule, 0.5)
    variance = float(latents.var())
    # Error of the best multiple of xt, for latents of this variance (a Wiener filter without neighbours).
    linear = variance * sigma**2 / (alpha**2 * variance + sigma**2)
    if not error < linear:
        raise Fault(
            f"half noised, the teacher's own samples are estimated with error {error:.3g}; ignoring their content "
            f"gives {linear:.3g}. Prediction type or noise schedule is wrong, or the teacher is untrained"
        )
    return f"error {error:.3g} half noised, {linear:.3g} without reading content"


@torch.no_grad()
def guidance(subject: Subject) -> str:
    """Check that scale 1 is the condition alone, that a larger one extrapolates from `uncond`, and that text counts."""
    denoiser, count = subject.denoiser, len(subject.cond)
    # The first row again, so that the batch is as large as the guided one's: kernels may depend on its size.
    xt, t = (
        subject.noise(1).expand(count, *subject.latent_shape),
        torch.full((count,), 0.7).to(subject.device),
    )
    empty = subject.uncond.expand(count)
    both = denoiser.x0(torch.cat([xt, xt]), torch.cat([t, t]), join(subject.cond, empty))
    with_text, without = both.chunk(2)
    scale = _guidance(subject)
    guided = guided_x0(denoiser, xt, t, subject.cond, subject.uncond, scale)
    expected = scale * with_text + (1 - scale) * without
    error = _relative(guided, expected)
    alone = _relative(guided_x0(denoiser, xt, t, subject.cond, subject.uncond, 1.0), with_text)
    effect = _relative(with_text, without)
    if not (error <= ROUND_TRIP_TOLERANCE and alone <= DTYPE_TOLERANCE):
        raise Fault(
            f"guidance {scale:g} is {error:.1e} from uncond + scale (cond - uncond), guidance 1 is {alone:.1e} "
            "from cond; the two halves are exchanged or weighed otherwise"
        )
    if not effect > 1e-6:
        raise Fault("the prompt changes nothing in the teacher's output; text conditions do not arrive")
    return f"uncond + {scale:g} (cond - uncond); the prompt moves the estimate by {effect:.1%}"


@torch.no_grad()
def zero_signal(subject: Subject) -> str:
    """A fake score that still is the teacher must give no signal: ADM's two steps equal bit for bit, DMD's zero.

    The fake score is made as in training and left in its mode, so that dropout shows.
    """
    teacher, count = subject.denoiser, min(2, len(subject.cond))
    # Some CPU convolutions take another path for weights that ask for gradients: last bits, and no fault.
    fake = subject.new_fake().requires_grad_(False)
    cond = subject.cond.take(torch.arange(count))
    worst, dmd = 0.0, 0.0
    for time in (0.1, 0.5, 0.9):
        t = torch.full((count,), time, device=subject.device)
        s = (t - subject.delta_t).clamp(min=0)
        xt = add_noise(teacher.schedule, subject.noise(count), subject.normal("signal", count), time)
        real_x0 = guided_x0(teacher, xt, t, cond, subject.uncond, 1.0)
        fake_x0 = fake.x0(xt, t, cond)
        real, ours = (
            ode_step(teacher.schedule, x, xt, spread(t, xt), spread(s, xt)) for x in (real_x0, fake_x0)
        )
        worst = max(worst, float((real - ours).abs().max()))
        dmd = max(dmd, _relative(fake_x0, real_x0))
    if _dtype(fake) != _dtype(teacher) and dmd > 0:
        if not dmd <= MIXED_TOLERANCE:
            raise Fault(f"fake = teacher in another precision: estimates differ by {dmd:.1e} of their size")
        return (
            f"fake in {_precision(fake)}, teacher in {_precision(teacher)}: estimates differ by {dmd:.1e} "
            "of their size, which heads may see; give both one precision if they do"
        )
    if worst > 0 or dmd > 0:
        raise Fault(
            f"a fake score with the teacher's weights steps {worst:.1e} away from it (DMD {dmd:.1e}); "
            "dropout, precision or loading differs between the two, and the discriminator would learn that"
        )
    return "fake = teacher: ADM's steps equal bitwise, DMD's signal 0"


@torch.no_grad()
def codec(subject: Subject) -> str:
    """Decode and encode the teacher's samples: their scale must be 1, and they must come back."""
    latents = subject.samples
    again = torch.cat([subject.codec.encode(pixels[None].clamp(-1, 1)) for pixels in subject.pixels])
    std, error = float(again.std()), float((again - latents).square().mean().sqrt() / latents.std())
    if not LATENT_STD[0] <= std <= LATENT_STD[1]:
        raise Fault(
            f"latents of pictures have standard deviation {std:.3g}, expected {LATENT_STD[0]} to {LATENT_STD[1]}; "
            "the VAE's scaling_factor or shift_factor is not the teacher's"
        )
    if not error <= CODEC_ERROR:
        raise Fault(
            f"decoding and encoding moves the teacher's samples by {error:.0%} of their size "
            f"(at most {CODEC_ERROR:.0%}); the VAE is not the one that the teacher was trained on"
        )
    return f"latents come back within {error:.0%}, standard deviation {std:.2f}"


@torch.no_grad()
def finite(subject: Subject) -> str:
    """Run the network at all times, with and without text, and the decoder: no overflow, and close to float32.

    At the student's times its estimate as well, in which a small error of noise may be a large one of the data.
    """
    denoiser, times = subject.denoiser, sorted({*TIMES, *subject.time_steps})
    both = join(subject.cond.take(torch.tensor([0])), subject.uncond)
    data, noise = subject.normal("data", 2), subject.noise(2)
    states = [
        (add_noise(denoiser.schedule, data, noise, t), torch.full((2,), t, device=subject.device))
        for t in times
    ]

    def outputs(network: Denoiser) -> list[Tensor]:
        return [network(xt, t, both) for xt, t in states]

    ours = outputs(denoiser)
    for time, out in zip(times, ours, strict=True):
        if not bool(out.isfinite().all()):
            raise Fault(
                f"the output at t = {time:g} is not finite in {_precision(denoiser)}; "
                "use precision float32, or bfloat16 with float32 weights"
            )
    if not bool(subject.pixels.isfinite().all()):
        raise Fault("the decoder's pixels are not finite; keep the VAE in float32")
    worst, estimate = 0.0, 0.0
    if subject.bf16 or _dtype(denoiser) != torch.float32:
        try:
            exact = outputs(subject.new_denoiser(False).requires_grad_(False).eval())
        except torch.OutOfMemoryError as error:  # training needs no such copy
            raise NotApplicable(
                f"finite at all times in {_precision(denoiser)}; no memory for a float32 copy to compare with"
            ) from error
        worst = max(map(_relative, ours, exact))
        estimate = max(
            float((read_x0(denoiser, a, xt, t) - read_x0(denoiser, b, xt, t)).square().mean().sqrt())
            for time, (xt, t), a, b in zip(times, states, ours, exact, strict=True)
            if time in subject.time_steps
        )
    if not worst <= DTYPE_TOLERANCE:
        raise Fault(
            f"{_precision(denoiser)} is {worst:.0%} from float32 (at most {DTYPE_TOLERANCE:.0%}); use float32"
        )
    if not estimate <= ESTIMATE_TOLERANCE:
        raise Fault(
            f"{_precision(denoiser)} moves the estimate at a student's time by {estimate:.2f} of the data's spread (at "
            f"most {ESTIMATE_TOLERANCE:g}): it says nothing there; use float32, or other time_steps"
        )
    return (
        f"finite at all times in {_precision(denoiser)}, {worst:.1%} from float32; the estimate at the student's times "
        f"by {estimate:.2f} of the data's spread"
    )


@torch.no_grad()
def images(subject: Subject) -> str:
    """Look at the teacher's pictures: finite, with contrast, within range, and different by prompt and seed."""
    pixels = subject.pixels
    if not bool(pixels.isfinite().all()):
        raise Fault("the teacher's pictures are not finite; see the check `finite`")
    contrast = float(pixels.clamp(-1, 1).flatten(1).std(1).mean())
    clipped = float((pixels.abs() > 1.05).float().mean())
    apart = float((pixels[0] - pixels[1:]).abs().mean())
    wrong = []
    if not CONTRAST[0] <= contrast <= CONTRAST[1]:
        wrong.append(f"contrast {contrast:.3f} outside {CONTRAST[0]} to {CONTRAST[1]}")
    if not clipped <= CLIPPED:
        wrong.append(f"{clipped:.0%} of the pixels out of range")
    if not apart > 0.01:
        wrong.append("all seeds and prompts give the same picture")
    if wrong:
        raise Fault(
            f"{'; '.join(wrong)}, from {subject.num_steps} steps at guidance {subject.guidance:g}: "
            "look at the teacher's pictures before distilling them"
        )
    return f"contrast {contrast:.2f}, {clipped:.1%} of the pixels clipped, seeds {apart:.2f} apart"


def perfect_output(prediction: Prediction, schedule: Schedule, x_0: Tensor, eps: Tensor, t: float) -> Tensor:
    """Return what a network that knew x_0 and eps would say at time t, by the definition of each prediction."""
    alpha, sigma = alpha_sigma(schedule, t)
    meanings: dict[Prediction, Tensor] = {
        "x0": x_0,
        "eps": eps,
        "v": alpha * eps - sigma * x_0,
        "flow": eps - x_0,
    }
    return meanings[prediction]


def _with_pipeline(subject: Subject) -> tuple[Denoiser, torch.nn.Module]:
    """Return the denoiser in its weights' own dtype, and the VAE, for the comparison with a pipeline."""
    if subject.scheduler is None or not has_pipeline(subject.denoiser):
        raise NotApplicable("this family has no diffusers pipeline")
    if not isinstance(subject.codec, VaeCodec):
        raise NotApplicable("no VAE of diffusers")
    plain = copy.copy(subject.denoiser)
    plain.bf16 = False  # type: ignore[assignment]  # every wrapper with a pipeline has it
    return plain, subject.codec.vae


def _ends(subject: Subject, denoiser: Denoiser, vae: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Return where our guided sampling ends, and diffusers'."""
    ours = sample_teacher(
        denoiser,
        subject.noise(1),
        subject.cond.take(torch.tensor([0])),
        subject.uncond,
        num_steps=PIPELINE_STEPS,
        guidance=_guidance(subject),
    )
    return ours, _trajectory(subject, denoiser, vae).latents


def _trajectory(subject: Subject, denoiser: Denoiser, vae: torch.nn.Module) -> Trajectory:
    assert subject.scheduler is not None
    return run_pipeline(
        denoiser,
        vae,
        subject.scheduler,
        subject.noise(1),
        subject.cond.take(torch.tensor([0])),
        subject.uncond,
        num_steps=PIPELINE_STEPS,
        guidance=_guidance(subject),
    )


def _guidance(subject: Subject) -> float:
    """The recipe's guidance; where it asks for none, one that would show."""
    return subject.guidance if subject.guidance > 1 else 3.0


def _relative(ours: Tensor, expected: Tensor) -> float:
    size = expected.float().square().mean().sqrt()
    return float((ours.float() - expected.float()).square().mean().sqrt() / size)


def _dtype(denoiser: Denoiser) -> torch.dtype:
    return next(denoiser.parameters()).dtype


def _precision(denoiser: Denoiser) -> str:
    weights = str(_dtype(denoiser)).removeprefix("torch.")
    return f"bfloat16 with {weights} weights" if getattr(denoiser, "bf16", False) else weights


def _name(schedule: Schedule) -> str:
    return schedule if isinstance(schedule, str) else "discrete betas"
