"""Adversarial distillation pre-training: match the teacher's ODE endpoints by two discriminators.

Source: arXiv 2507.18569, adversarial distillation pre-training. Reals are the pair's own endpoint x_0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import add_noise
from ..core.times import biased_times
from ..losses import discriminator_hinge, generator_hinge
from ..pairs.store import Pairs
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser, spread
from .recipe import AdpRecipe
from .step import accuracy_by_time, device_of, judge, sender, shaken, update


@dataclass(frozen=True)
class Adp:
    """The networks of ADP and its updates: discriminators, then student.

    `pixel` and `decode` are None to leave the pixel discriminator out (lambda_pixel 0).
    """

    recipe: AdpRecipe
    draws: Draws
    pairs: Pairs
    cond: Condition  # one row for each of the pairs' prompts
    student: Denoiser
    latent: nn.Module
    pixel: nn.Module | None
    decode: Callable[[Tensor], Tensor] | None
    optimizers: Mapping[str, Optimizer]
    ranks: Ranks = ALONE

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role."""
        pixel = {} if self.pixel is None else {"pixel": self.pixel}
        return {"student": self.student, "latent": self.latent, **pixel}

    def step(self, step: int) -> dict[str, float]:
        """Update the heads, and after the warm-up the student."""
        recipe, draws = self.recipe, self.draws
        rows, device = self.ranks.rows(recipe.batch_size), device_of(self.student)
        send = sender(device)
        moves = step >= recipe.warmup_steps

        # The student's estimate of the clean latents from a point on the pair's straight line.
        picks = torch.from_numpy(draws.integers("adp/pair", step, rows, len(self.pairs)))
        x_0, x_T = self.pairs.x_0[picks].to(device), self.pairs.x_T[picks].to(device)
        cond = self.cond.take(self.pairs.prompt[picks]).to(device)
        t = send(biased_times(draws.uniform("adp/time", step, rows), recipe.time_power)).float()
        xt = add_noise("rectified-flow", x_0, x_T, spread(t, x_0))
        with torch.set_grad_enabled(moves):
            fake = self.student.x0(xt, t, cond)

        # Both sides are noised alike, to the discriminator's own time.
        s = send(draws.uniform("adp/latent-time", step, rows)).float()
        eps = send(draws.normal("adp/latent-noise", step, rows, x_0.shape[1:]))
        schedule = self.student.schedule
        noised_real = add_noise(schedule, x_0, eps, spread(s, x_0))
        noised_fake = add_noise(schedule, fake, eps, spread(s, x_0))

        # Discriminators.
        real, guess = judge(self.latent, noised_real, noised_fake.detach(), s, cond)
        loss = recipe.lambda_latent * discriminator_hinge(real, guess)
        if recipe.r1_weight > 0:
            noise = recipe.r1_std * send(draws.normal("adp/r1", step, rows, x_0.shape[1:]))
            loss = loss + recipe.r1_weight * shaken(self.latent, noised_real, real, s, cond, noise)
        logs = {"latent_hinge": discriminator_hinge(real, guess).item(), **accuracy_by_time(real, guess, s)}
        pixels_fake: Tensor | None = None
        if self.pixel is not None and self.decode is not None:
            few = len(self.ranks.rows(recipe.pixel_batch))
            pixels_fake = self.decode(fake[:few])
            pixels_real = self.decode(x_0[:few])
            real, guess = self.pixel(torch.cat([pixels_real, pixels_fake.detach()])).chunk(2)
            loss = loss + recipe.lambda_pixel * discriminator_hinge(real, guess)
            logs["pixel_hinge"] = discriminator_hinge(real, guess).item()
        heads = [self.optimizers[role] for role in self.modules if role != "student"]
        logs["heads_norm"] = update(loss, heads, recipe.clip, self.ranks)
        logs["distance"] = (fake.detach() - x_0).square().mean().item()

        # Student.
        if moves:
            adversarial = recipe.lambda_latent * generator_hinge(self.latent(noised_fake, s, cond))
            if self.pixel is not None and pixels_fake is not None:
                adversarial = adversarial + recipe.lambda_pixel * generator_hinge(self.pixel(pixels_fake))
            logs["student_norm"] = update(adversarial, [self.optimizers["student"]], recipe.clip, self.ranks)
            logs["student_loss"] = adversarial.item()
        return logs
