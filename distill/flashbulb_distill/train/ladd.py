"""Latent adversarial diffusion distillation: the student denoises noised teacher samples, and heads on the frozen
teacher judge what it makes of them.

Source: Sauer et al. 2024 (LADD, arXiv 2403.12015). Its training data are the teacher's own samples; here these are the
endpoints of the ODE pairs, with fresh noise: unlike in ADP, the student's input does not know which picture the teacher
made of that noise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import add_noise
from ..core.times import logit_normal_times
from ..losses import discriminator_hinge, generator_hinge
from ..pairs.store import DrawnPairs
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser, spread
from .recipe import LaddRecipe
from .step import Judged, Means, Parts, device_of, judge, sender, shaken, update


@dataclass(frozen=True)
class Ladd:
    """The networks of LADD and its updates: heads, then student."""

    recipe: LaddRecipe
    draws: Draws
    pairs: DrawnPairs
    cond: Condition  # one row for each of the pairs' prompts
    time_steps: Sequence[float]
    student: Denoiser
    latent: nn.Module
    optimizers: Mapping[str, Optimizer]
    ranks: Ranks = ALONE
    micro_batch: int | None = None  # rows that are computed at once; None is all

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role."""
        return {"student": self.student, "latent": self.latent}

    def step(self, step: int) -> dict[str, float]:
        """Update the heads, and after the warm-up the student."""
        parts = Parts(self.ranks.rows(self.recipe.batch_size), self.micro_batch)
        moves = step >= self.recipe.warmup_steps
        guesses = [self._guess(step, part, gradient=moves and parts.is_whole) for part in parts]
        logs = self._update_heads(step, parts, guesses)
        if moves:
            logs |= self._update_student(step, parts, guesses)
        return logs

    def _guess(self, step: int, rows: range, *, gradient: bool) -> "_Guess":
        """Let the student estimate the pairs' endpoints from one of its own times; noise both sides alike."""
        recipe, draws, device = self.recipe, self.draws, device_of(self.student)
        send = sender(device)
        picks = torch.from_numpy(draws.integers("ladd/pair", step, rows, self.pairs.known(step)))
        x_0 = self.pairs.x_0[picks].to(device)
        cond = self.cond.take(self.pairs.prompt[picks]).to(device)
        which = draws.integers("ladd/step", step, rows, len(self.time_steps))
        t = torch.tensor([self.time_steps[index] for index in which], device=device)
        noise = send(draws.normal("ladd/noise", step, rows, x_0.shape[1:]))
        xt = add_noise(self.student.schedule, x_0, noise, spread(t, x_0))
        with torch.set_grad_enabled(gradient):
            fake = self.student.x0(xt, t, cond)

        uniform = draws.uniform("ladd/latent-time", step, rows)
        s = send(logit_normal_times(uniform, mean=recipe.time_mean, std=recipe.time_std)).float()
        eps = send(draws.normal("ladd/latent-noise", step, rows, x_0.shape[1:]))
        noised_real, noised_fake = (
            add_noise(self.student.schedule, x, eps, spread(s, x_0)) for x in (x_0, fake)
        )
        return _Guess(rows, cond, noised_real, noised_fake, s)

    def _update_heads(self, step: int, parts: Parts, guesses: "Sequence[_Guess]") -> dict[str, float]:
        """Teach the heads to tell the pairs' endpoints from the student's estimates; return what to log."""
        recipe, logs, judged = self.recipe, Means(), Judged()

        def losses() -> Iterator[Tensor]:
            for guess in guesses:
                share, real_x = parts.share(guess.rows), guess.noised_real
                real, fake = judge(self.latent, real_x, guess.noised_fake.detach(), guess.s, guess.cond)
                loss = hinge = discriminator_hinge(real, fake)
                if recipe.r1_weight > 0:
                    drawn = self.draws.normal("ladd/r1", step, guess.rows, real_x.shape[1:])
                    noise = recipe.r1_std * sender(real_x.device)(drawn)
                    penalty = shaken(self.latent, real_x, real, guess.s, guess.cond, noise)
                    loss = loss + recipe.r1_weight * penalty
                logs.add(share, latent_hinge=hinge)
                judged.add(real, fake, guess.s)
                yield share * loss

        norm = update(losses(), [self.optimizers["latent"]], recipe.clip, self.ranks)
        return {"heads_norm": norm, **logs, **judged.accuracy()}

    def _update_student(self, step: int, parts: Parts, guesses: "Sequence[_Guess]") -> dict[str, float]:
        """Move the student to where the heads take its estimates for the pairs; return what to log."""
        logs = Means()

        def losses() -> Iterator[Tensor]:
            for made in guesses:
                guess = made if parts.is_whole else self._guess(step, made.rows, gradient=True)
                loss = generator_hinge(self.latent(guess.noised_fake, guess.s, guess.cond))
                logs.add(parts.share(guess.rows), student_loss=loss)
                yield parts.share(guess.rows) * loss

        norm = update(losses(), [self.optimizers["student"]], self.recipe.clip, self.ranks)
        return {"student_norm": norm, **logs}


@dataclass(frozen=True, slots=True)
class _Guess:
    """Some rows of a batch: the pairs' endpoints and the student's estimates of them, noised to times s [b]."""

    rows: range
    cond: Condition
    noised_real: Tensor
    noised_fake: Tensor
    s: Tensor
