"""Adversarial distribution matching: from one noised student sample, the teacher's and the fake score's short
ODE steps are told apart by a discriminator, and the student is trained to make that impossible.

Source: arXiv 2507.18569, adversarial distribution matching. No data, no regression, no further term.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import Schedule, add_noise, alpha_sigma, ode_step
from ..core.times import adm_times, logit_normal_times
from ..losses import discriminator_hinge, generator_hinge
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser, guided_x0, spread
from .fake import pull, update_fake
from .recipe import AdmRecipe
from .simulate import simulate_student
from .step import accuracy_by_time, device_of, judge, ordered, sender, shaken, update


def keep_position(schedule: Schedule, xt: Tensor, xs: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return xs with a gradient to xt alone: the score network's own Jacobian is dropped.

    xs = k xt + e(network): under rectified flow k = 1 and e holds the velocity, under a variance-preserving
    schedule k = alpha(s) / alpha(t) and e holds the noise estimate.
    """
    k: Tensor | float = 1.0
    if schedule != "rectified-flow":
        k = alpha_sigma(schedule, s)[0] / alpha_sigma(schedule, t)[0]
    moved = k * xt
    # The value is xs to the last bit: a rounding of it would be there for the discriminator to see.
    return xs.detach() + (moved - moved.detach())


@dataclass(frozen=True)
class Adm:
    """The networks of ADM and its updates: fake score, discriminator, then student."""

    recipe: AdmRecipe
    draws: Draws
    cond: Condition  # one row for each training prompt
    uncond: Condition  # the empty prompt
    latent_shape: tuple[int, ...]
    time_steps: Sequence[float]
    teacher: Denoiser
    student: Denoiser
    fake: Denoiser
    latent: nn.Module
    optimizers: Mapping[str, Optimizer]
    ranks: Ranks = ALONE

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role."""
        return {"student": self.student, "fake": self.fake, "latent": self.latent}

    def step(self, step: int) -> dict[str, float]:
        """Update the fake score and the heads, and the student after the warm-up, every `update_ratio` steps."""
        recipe, draws = self.recipe, self.draws
        rows, send = self.ranks.rows(recipe.batch_size), sender(device_of(self.student))
        moves = step >= recipe.warmup_steps and step % recipe.update_ratio == 0

        picks = torch.from_numpy(draws.integers("adm/prompt", step, rows, len(self.cond)))
        cond = self.cond.take(picks).to(device_of(self.student))
        with torch.set_grad_enabled(moves):
            x_0 = simulate_student(
                self.student,
                cond,
                draws=draws,
                purpose="adm",
                step=step,
                rows=rows,
                latent_shape=self.latent_shape,
                time_steps=self.time_steps,
            )

        logs = update_fake(
            self.fake,
            self.optimizers["fake"],
            x_0.detach(),
            cond,
            draws=draws,
            purpose="adm",
            step=step,
            rows=rows,
            updates=recipe.fake_updates,
            clip=recipe.clip,
            ranks=self.ranks,
        )

        # One noised student sample, two short steps down the flow: by the teacher and by the fake score.
        low, high = recipe.time_range
        uniform = draws.uniform("adm/time", step, rows)
        low = max(low, recipe.delta_t)
        if recipe.time_distribution == "uniform":
            times = adm_times(uniform, low=low, high=high)
        else:
            times = logit_normal_times(
                uniform, mean=recipe.time_mean, std=recipe.time_std, low=low, high=high
            )
        t = send(times).float()
        s = (t - recipe.delta_t).clamp(min=0)
        eps = send(draws.normal("adm/noise", step, rows, x_0.shape[1:]))
        xt = add_noise(self.teacher.schedule, x_0, eps, spread(t, x_0))  # float32, as both steps must be
        with torch.no_grad():
            real_x0 = guided_x0(self.teacher, xt, t, cond, self.uncond, recipe.guidance)
            x_real = self._advance(real_x0, xt, t, s)
        with torch.set_grad_enabled(moves and recipe.jacobian == "full"):
            fake_x0 = self.fake.x0(xt, t, cond)
            x_fake = self._advance(fake_x0, xt, t, s)
        if recipe.jacobian == "detach":
            at, to = spread(t, xt), spread(s, xt)
            x_fake = keep_position(self.teacher.schedule, xt, x_fake, at, to)
        # Not trained on: the paper reports that this falls all the same (its Figure 3).
        logs["dmd"] = (fake_x0.detach() - real_x0).square().mean().item()

        # Discriminator: both sides in one batch, so that the arithmetic's own noise is common to them.
        real, guess = judge(self.latent, x_real, x_fake.detach(), s, cond)
        loss = hinge = discriminator_hinge(real, guess)
        if recipe.r1_weight > 0:
            noise = recipe.r1_std * send(draws.normal("adm/r1", step, rows, x_0.shape[1:]))
            loss = loss + recipe.r1_weight * shaken(self.latent, x_real, real, s, cond, noise)
        norm = update(loss, [self.optimizers["latent"]], recipe.clip, self.ranks)
        logs |= {"heads_norm": norm, "latent_hinge": hinge.item(), "margin": (real - guess).mean().item()}
        logs["ordered"] = ordered(real, guess)
        logs |= accuracy_by_time(real, guess, s)

        if moves:
            adversarial = generator_hinge(self.latent(x_fake, s, cond))
            logs["student_norm"] = update(adversarial, [self.optimizers["student"]], recipe.clip, self.ranks)
            logs["student_loss"] = adversarial.item()
            if recipe.ida > 0:
                pull(self.fake, self.student, recipe.ida)
        return logs

    def _advance(self, x0_hat: Tensor, xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        xs: Tensor = ode_step(self.teacher.schedule, x0_hat, xt, spread(t, xt), spread(s, xt))
        return xs
