"""Distribution matching distillation: the student moves down the difference of two scores, the teacher's and its own.

Source: DMD (Yin et al. 2023, arXiv 2311.18828) without its regression, as ablations B2 and B3 of arXiv 2507.18569; with
`gan_weight` DMD2 (Yin et al. 2024, arXiv 2405.14867). Two differences from DMD2: its discriminator reads the fake
score's features and trains them, ours reads the frozen teacher's through heads, as ADM's does; its real pictures come
from a data set, ours are the endpoints of the teacher's ODE pairs, so that every method here learns from the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import add_noise
from ..core.times import adm_times
from ..losses import discriminator_softplus, dmd_gradient, dmd_loss, generator_softplus
from ..pairs.store import Pairs
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser, guided_x0, spread
from .fake import Samples, pull, update_fake
from .recipe import DmdRecipe
from .simulate import simulate_student
from .step import accuracy_by_time, device_of, judge, sender, shaken, update


@dataclass(frozen=True)
class Dmd:
    """The networks of DMD and its updates: fake score, heads (DMD2), then student.

    `latent` and `pairs` are None without the GAN term.
    """

    recipe: DmdRecipe
    draws: Draws
    cond: Condition  # one row for each training prompt
    uncond: Condition  # the empty prompt
    latent_shape: tuple[int, ...]
    time_steps: Sequence[float]
    teacher: Denoiser
    student: Denoiser
    fake: Denoiser
    optimizers: Mapping[str, Optimizer]
    latent: nn.Module | None = None
    pairs: Pairs | None = None
    ranks: Ranks = ALONE

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role."""
        latent = {} if self.latent is None else {"latent": self.latent}
        return {"student": self.student, "fake": self.fake, **latent}

    def step(self, step: int) -> dict[str, float]:
        """Update the fake score and the heads, and the student after the warm-up, every `update_ratio` steps."""
        recipe, draws = self.recipe, self.draws
        rows, send = self.ranks.rows(recipe.batch_size), sender(device_of(self.student))
        moves = step >= recipe.warmup_steps and step % recipe.update_ratio == 0

        picks, real = self._prompts(step, rows)
        cond = self.cond.take(picks)
        with torch.set_grad_enabled(moves):
            x_0 = simulate_student(
                self.student,
                cond,
                draws=draws,
                purpose="dmd",
                step=step,
                rows=rows,
                latent_shape=self.latent_shape,
                time_steps=self.time_steps,
            )
        logs = update_fake(
            self.fake,
            self.optimizers["fake"],
            [Samples(rows, cond, x_0)],
            draws=draws,
            purpose="dmd",
            step=step,
            updates=recipe.fake_updates,
            clip=recipe.clip,
            ranks=self.ranks,
        )

        # Heads: a real and a generated picture of one prompt, noised alike.
        s = send(draws.uniform("dmd/latent-time", step, rows)).float()
        eps = send(draws.normal("dmd/latent-noise", step, rows, x_0.shape[1:]))
        noised = add_noise(self.teacher.schedule, x_0, eps, spread(s, x_0))
        if self.latent is not None and real is not None:
            noised_real = add_noise(self.teacher.schedule, real, eps, spread(s, x_0))
            said, guess = judge(self.latent, noised_real, noised.detach(), s, cond)
            loss = gan = discriminator_softplus(said, guess)
            if recipe.r1_weight > 0:
                shake = recipe.r1_std * send(draws.normal("dmd/r1", step, rows, x_0.shape[1:]))
                loss = loss + recipe.r1_weight * shaken(self.latent, noised_real, said, s, cond, shake)
            norm = update(loss, [self.optimizers["latent"]], recipe.clip, self.ranks)
            logs |= {"heads_norm": norm, "latent_loss": gan.item(), **accuracy_by_time(said, guess, s)}

        # Student.
        if moves:
            low, high = recipe.time_range
            t = send(adm_times(draws.uniform("dmd/time", step, rows), low=low, high=high)).float()
            eps = send(draws.normal("dmd/noise", step, rows, x_0.shape[1:]))
            with torch.no_grad():
                xt = add_noise(self.teacher.schedule, x_0, eps, spread(t, x_0))
                x0_real = guided_x0(self.teacher, xt, t, cond, self.uncond, recipe.guidance)
                x0_fake = self.fake.x0(xt, t, cond)
            loss = dmd_loss(x_0, dmd_gradient(x_0, x0_fake, x0_real))
            logs |= {"dmd": (x0_fake - x0_real).square().mean().item(), "student_loss": loss.item()}
            if self.latent is not None:
                loss = loss + recipe.gan_weight * generator_softplus(self.latent(noised, s, cond))
            logs["student_norm"] = update(loss, [self.optimizers["student"]], recipe.clip, self.ranks)
            if recipe.ida > 0:
                pull(self.fake, self.student, recipe.ida)
        return logs

    def _prompts(self, step: int, rows: range) -> tuple[Tensor, Tensor | None]:
        """Draw prompts, int64 [b]; with the GAN term those of drawn pairs, and the pairs' endpoints."""
        if self.pairs is None:
            return torch.from_numpy(self.draws.integers("dmd/prompt", step, rows, len(self.cond))), None
        picks = torch.from_numpy(self.draws.integers("dmd/pair", step, rows, len(self.pairs)))
        return self.pairs.prompt[picks], self.pairs.x_0[picks].to(device_of(self.student))
