"""Latent adversarial diffusion distillation: the student denoises noised teacher samples, and heads on the frozen
teacher judge what it makes of them.

Source: Sauer et al. 2024 (LADD, arXiv 2403.12015). Its training data are the teacher's own samples; here these are the
endpoints of the ODE pairs, with fresh noise: unlike in ADP, the student's input does not know which picture the teacher
made of that noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import add_noise
from ..core.times import logit_normal_times
from ..losses import discriminator_hinge, generator_hinge
from ..pairs.store import Pairs
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser, spread
from .recipe import LaddRecipe
from .step import accuracy_by_time, device_of, judge, sender, shaken, update


@dataclass(frozen=True)
class Ladd:
    """The networks of LADD and its updates: heads, then student."""

    recipe: LaddRecipe
    draws: Draws
    pairs: Pairs
    cond: Condition  # one row for each of the pairs' prompts
    time_steps: Sequence[float]
    student: Denoiser
    latent: nn.Module
    optimizers: Mapping[str, Optimizer]
    ranks: Ranks = ALONE

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role."""
        return {"student": self.student, "latent": self.latent}

    def step(self, step: int) -> dict[str, float]:
        """Update the heads, and after the warm-up the student."""
        recipe, draws = self.recipe, self.draws
        rows, device = self.ranks.rows(recipe.batch_size), device_of(self.student)
        send = sender(device)
        moves = step >= recipe.warmup_steps

        # The student's estimate from one of its own times.
        picks = torch.from_numpy(draws.integers("ladd/pair", step, rows, len(self.pairs)))
        x_0 = self.pairs.x_0[picks].to(device)
        cond = self.cond.take(self.pairs.prompt[picks])
        which = draws.integers("ladd/step", step, rows, len(self.time_steps))
        t = torch.tensor([self.time_steps[index] for index in which], device=device)
        noise = send(draws.normal("ladd/noise", step, rows, x_0.shape[1:]))
        xt = add_noise(self.student.schedule, x_0, noise, spread(t, x_0))
        with torch.set_grad_enabled(moves):
            fake = self.student.x0(xt, t, cond)

        # Both sides, noised alike.
        uniform = draws.uniform("ladd/latent-time", step, rows)
        s = send(logit_normal_times(uniform, mean=recipe.time_mean, std=recipe.time_std)).float()
        eps = send(draws.normal("ladd/latent-noise", step, rows, x_0.shape[1:]))
        noised_real, noised_fake = (
            add_noise(self.student.schedule, x, eps, spread(s, x_0)) for x in (x_0, fake)
        )
        real, guess = judge(self.latent, noised_real, noised_fake.detach(), s, cond)
        loss = hinge = discriminator_hinge(real, guess)
        if recipe.r1_weight > 0:
            shake = recipe.r1_std * send(draws.normal("ladd/r1", step, rows, x_0.shape[1:]))
            loss = loss + recipe.r1_weight * shaken(self.latent, noised_real, real, s, cond, shake)
        norm = update(loss, [self.optimizers["latent"]], recipe.clip, self.ranks)
        logs = {"heads_norm": norm, "latent_hinge": hinge.item(), **accuracy_by_time(real, guess, s)}

        if moves:
            adversarial = generator_hinge(self.latent(noised_fake, s, cond))
            logs["student_norm"] = update(adversarial, [self.optimizers["student"]], recipe.clip, self.ranks)
            logs["student_loss"] = adversarial.item()
        return logs
