"""A cheap look at what the student draws now, beside its teacher: colour, contrast, diversity across seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ..core.draws import Draws
from ..core.sampler import sample
from ..pairs.generate import sample_teacher
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser

TEACHER_STEPS = 10


def evenly(prompts: Sequence[str], count: int) -> list[int]:
    """Return the places of `count` distinct prompts, evenly through the list: a list is often sorted by subject."""
    places = sorted({prompt: place for place, prompt in reversed([*enumerate(prompts)])}.values())
    count = min(count, len(places))
    return [places[index * len(places) // count] for index in range(count)]


def compare_samples(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Compare samples [prompts, seeds, channels, ...] of the same prompts and seeds.

    Returns:
        colour_drift: mean distance of a prompt's channel means, in standard deviations of the teacher's samples.
        contrast: standard deviation within a sample, over the teacher's.
        diversity: root mean square distance of two seeds of a prompt, over the teacher's. 0: one sample a prompt.
    """
    ours, theirs = (s.flatten(3) if s.ndim > 3 else s[..., None] for s in (student.float(), teacher.float()))
    size = theirs.std().clamp(min=1e-12)
    # Over all seeds of all prompts: a seed's own colour is its choice.
    drift = (ours.mean((0, 1, 3)) - theirs.mean((0, 1, 3))).square().mean().sqrt() / size
    return {
        "colour_drift": float(drift),
        "contrast": _ratio(ours.flatten(2).std(2).mean(), theirs.flatten(2).std(2).mean()),
        "diversity": _ratio(_apart(ours), _apart(theirs)),
    }


def _apart(samples: Tensor) -> Tensor:
    """Root mean square distance of two different seeds of a prompt."""
    # The variance over seeds is half the mean square distance of two of them.
    return (2 * samples.var(1).mean()).sqrt()


def _ratio(ours: Tensor, theirs: Tensor) -> float:
    return float(ours / theirs.clamp(min=1e-12))


@dataclass(frozen=True)
class Probe:
    """Draws a few prompts with a few seeds, by the student as it is used and once by the teacher.

    Args:
        cond: the prompts, one row each.   seeds: how many of each.
        decode: latents to what is compared; the latents themselves for None.
        show: gets the step and the student's samples [prompts, seeds, ...] each time; on the first rank.
        ranks: who share the prompts. All draw at the same point and get the figures of all, since a network that is
            shared out answers to all ranks or to none.
    """

    teacher: Denoiser
    cond: Condition
    uncond: Condition
    latent_shape: tuple[int, ...]
    time_steps: Sequence[float]
    guidance: float
    draws: Draws
    seeds: int = 4
    decode: Callable[[Tensor], Tensor] | None = None
    show: Callable[[int, Tensor], None] | None = None
    ranks: Ranks = ALONE

    def __call__(self, step: int, student: Denoiser) -> dict[str, float]:
        """Return the figures of `compare_samples` for the student after a step."""
        samples = self._sample(student)
        if self.show is not None and self.ranks.is_first:
            self.show(step, samples)
        return compare_samples(samples, self._by_teacher)

    @cached_property
    def _by_teacher(self) -> Tensor:
        def draw(noises: Callable[[int], Tensor], cond: Condition) -> Tensor:
            return sample_teacher(
                self.teacher,
                noises(0),
                cond,
                self.uncond,
                num_steps=TEACHER_STEPS,
                guidance=self.guidance,
            )

        return self._prompt_by_prompt(draw)

    def _sample(self, student: Denoiser) -> Tensor:
        def draw(noises: Callable[[int], Tensor], cond: Condition) -> Tensor:
            def denoise(xt: Tensor, t: float) -> Tensor:
                out: Tensor = student(xt, torch.full((len(xt),), t, device=xt.device), cond)
                return out

            latents: Tensor = sample(
                denoise,
                noises(0),
                self.time_steps,
                prediction=student.prediction,
                schedule=student.schedule,
                renoise=noises,
            )
            return latents

        return self._prompt_by_prompt(draw)

    @torch.no_grad()
    def _prompt_by_prompt(self, draw: Callable[[Callable[[int], Tensor], Condition], Tensor]) -> Tensor:
        """Return samples [prompts, seeds, ...] on the CPU; a prompt at a time, so that a probe needs little memory."""
        device = next(self.teacher.parameters(), self.uncond.tokens).device
        mine: dict[int, Tensor] = {}
        for row in self.ranks.dealt(len(self.cond)):
            rows = range(row * self.seeds, (row + 1) * self.seeds)
            noises = partial(self._noise, rows=rows, device=device)
            latents = draw(noises, self.cond.take(torch.tensor([row])).expand(self.seeds))
            mine[row] = (latents if self.decode is None else self.decode(latents).clamp(-1, 1)).cpu()
        drawn = {row: samples for part in self.ranks.gather(mine) for row, samples in part.items()}
        return torch.stack([drawn[row] for row in range(len(self.cond))])

    def _noise(self, step: int, *, rows: range, device: torch.device) -> Tensor:
        return torch.from_numpy(self.draws.normal("guard/noise", step, rows, self.latent_shape)).to(device)
