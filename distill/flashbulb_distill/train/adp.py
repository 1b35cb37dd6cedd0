"""Adversarial distillation pre-training: match the teacher's ODE endpoints by two discriminators.

Source: arXiv 2507.18569, adversarial distillation pre-training. Reals are the pair's own endpoint x_0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import add_noise
from ..core.times import biased_times
from ..losses import discriminator_hinge, generator_hinge
from ..pairs.store import DrawnPairs
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser, spread
from .recipe import AdpRecipe
from .step import Judged, Means, Parts, device_of, judge, sender, shaken, update


@dataclass(frozen=True)
class Adp:
    """The networks of ADP and its updates: discriminators, then student.

    `pixel` and `decode` are None to leave the pixel discriminator out (lambda_pixel 0).
    """

    recipe: AdpRecipe
    draws: Draws
    pairs: DrawnPairs
    cond: Condition  # one row for each of the pairs' prompts
    student: Denoiser
    latent: nn.Module
    pixel: nn.Module | None
    decode: Callable[[Tensor], Tensor] | None
    optimizers: Mapping[str, Optimizer]
    ranks: Ranks = ALONE
    micro_batch: int | None = None  # rows that are computed at once; None is all

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role."""
        pixel = {} if self.pixel is None else {"pixel": self.pixel}
        return {"student": self.student, "latent": self.latent, **pixel}

    def step(self, step: int) -> dict[str, float]:
        """Update the heads, and after the warm-up the student."""
        parts = Parts(self.ranks.rows(self.recipe.batch_size), self.micro_batch)
        moves = step >= self.recipe.warmup_steps
        guesses = [self._guess(step, parts, part, gradient=moves and parts.is_whole) for part in parts]
        logs = self._update_heads(step, parts, guesses)
        if moves:
            logs |= self._update_student(step, parts, guesses)
        return logs

    def _guess(self, step: int, parts: Parts, rows: range, *, gradient: bool) -> "_Guess":
        """Let the student estimate the clean latents from points on the pairs' straight lines; noise both sides."""
        draws, device = self.draws, device_of(self.student)
        send = sender(device)
        picks = torch.from_numpy(draws.integers("adp/pair", step, rows, self.pairs.known(step)))
        x_0, x_T = self.pairs.x_0[picks].to(device), self.pairs.x_T[picks].to(device)
        cond = self.cond.take(self.pairs.prompt[picks]).to(device)
        t = send(biased_times(draws.uniform("adp/time", step, rows), self.recipe.time_power)).float()
        xt = add_noise("rectified-flow", x_0, x_T, spread(t, x_0))
        few = parts.within(rows, self._all_shown(parts))
        with torch.set_grad_enabled(gradient):
            fake = self.student.x0(xt, t, cond)
            pixels = self.decode(fake[:few]) if self.decode is not None and few else None

        # Both sides are noised alike, to the discriminator's own time.
        s = send(draws.uniform("adp/latent-time", step, rows)).float()
        eps = send(draws.normal("adp/latent-noise", step, rows, x_0.shape[1:]))
        schedule = self.student.schedule
        noised_real, noised_fake = (add_noise(schedule, x, eps, spread(s, x_0)) for x in (x_0, fake))
        return _Guess(rows, cond, x_0, fake, pixels, noised_real, noised_fake, s)

    def _update_heads(self, step: int, parts: Parts, guesses: "Sequence[_Guess]") -> dict[str, float]:
        """Teach both discriminators to tell the pairs from the student's guesses; return what to log."""
        recipe, logs, judged = self.recipe, Means(), Judged()

        def losses() -> Iterator[Tensor]:
            for guess in guesses:
                share = parts.share(guess.rows)
                real, fake = judge(
                    self.latent, guess.noised_real, guess.noised_fake.detach(), guess.s, guess.cond
                )
                hinge = discriminator_hinge(real, fake)
                loss = recipe.lambda_latent * hinge
                if recipe.r1_weight > 0:
                    drawn = self.draws.normal("adp/r1", step, guess.rows, guess.x_0.shape[1:])
                    noise = recipe.r1_std * sender(guess.x_0.device)(drawn)
                    penalty = shaken(self.latent, guess.noised_real, real, guess.s, guess.cond, noise)
                    loss = loss + recipe.r1_weight * penalty
                logs.add(
                    share, latent_hinge=hinge, distance=(guess.fake.detach() - guess.x_0).square().mean()
                )
                judged.add(real, fake, guess.s)
                loss = share * loss
                if self.pixel is not None and guess.pixels is not None and self.decode is not None:
                    share = len(guess.pixels) / self._all_shown(parts)
                    pixels = [self.decode(guess.x_0[: len(guess.pixels)]), guess.pixels.detach()]
                    real, fake = self.pixel(torch.cat(pixels)).chunk(2)
                    hinge = discriminator_hinge(real, fake)
                    logs.add(share, pixel_hinge=hinge)
                    loss = loss + share * recipe.lambda_pixel * hinge
                yield loss

        heads = [self.optimizers[role] for role in self.modules if role != "student"]
        norm = update(losses(), heads, recipe.clip, self.ranks)
        return {**logs, "heads_norm": norm, **judged.accuracy()}

    def _update_student(self, step: int, parts: Parts, guesses: "Sequence[_Guess]") -> dict[str, float]:
        """Move the student to where the discriminators take its guesses for the pairs; return what to log."""
        recipe, logs = self.recipe, Means()

        def losses() -> Iterator[Tensor]:
            for made in guesses:
                guess = made if parts.is_whole else self._guess(step, parts, made.rows, gradient=True)
                judged = generator_hinge(self.latent(guess.noised_fake, guess.s, guess.cond))
                loss = parts.share(guess.rows) * recipe.lambda_latent * judged
                if self.pixel is not None and guess.pixels is not None:
                    share = len(guess.pixels) / self._all_shown(parts)
                    loss = loss + share * recipe.lambda_pixel * generator_hinge(self.pixel(guess.pixels))
                logs.add(1.0, student_loss=loss)
                yield loss

        norm = update(losses(), [self.optimizers["student"]], recipe.clip, self.ranks)
        return {"student_norm": norm, **logs}

    def _all_shown(self, parts: Parts) -> int:
        """Return how many of the batch's rows the pixel discriminator sees: the first ones."""
        return min(len(self.ranks.rows(self.recipe.pixel_batch)), len(parts.rows)) if self.pixel else 0


@dataclass(frozen=True, slots=True)
class _Guess:
    """Some rows of a batch: the pairs' endpoints, the student's guesses, and both noised to times s [b]."""

    rows: range
    cond: Condition
    x_0: Tensor
    fake: Tensor
    pixels: Tensor | None  # of the guesses that the pixel discriminator sees
    noised_real: Tensor
    noised_fake: Tensor
    s: Tensor
