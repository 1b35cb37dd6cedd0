"""Adversarial distribution matching: from one noised student sample, the teacher's and the fake score's short
ODE steps are told apart by a discriminator, and the student is trained to make that impossible.

Source: arXiv 2507.18569, adversarial distribution matching. No data, no regression, no further term.
"""

from collections.abc import Iterator, Mapping, Sequence
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
from .fake import Samples, pull, update_fake
from .recipe import AdmRecipe
from .simulate import simulate_student
from .step import Judged, Means, Parts, judge, sender, shaken, update


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
    micro_batch: int | None = None  # rows that are computed at once; None is all

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role."""
        return {"student": self.student, "fake": self.fake, "latent": self.latent}

    def step(self, step: int) -> dict[str, float]:
        """Update the fake score and the heads, and the student after the warm-up, every `update_ratio` steps."""
        recipe = self.recipe
        parts = Parts(self.ranks.rows(recipe.batch_size), self.micro_batch)
        moves = step >= recipe.warmup_steps and step % recipe.update_ratio == 0
        # A whole batch's samples keep their graph until the student's turn; of parts they are made again.
        gradient = moves and parts.is_whole
        samples = [self._simulate(step, part, gradient=gradient) for part in parts]
        logs = update_fake(
            self.fake,
            self.optimizers["fake"],
            samples,
            draws=self.draws,
            purpose="adm",
            step=step,
            updates=recipe.fake_updates,
            clip=recipe.clip,
            ranks=self.ranks,
        )
        pairs = [self._pair(step, some, gradient=gradient) for some in samples]
        # Not trained on: the paper reports that this falls all the same (its Figure 3).
        logs["dmd"] = torch.cat([pair.gap for pair in pairs]).mean().item()
        logs |= self._update_heads(step, parts, pairs)
        if moves:
            logs |= self._update_student(step, parts, pairs)
            if recipe.ida > 0:
                pull(self.fake, self.student, recipe.ida)
        return logs

    def _simulate(self, step: int, rows: range, *, gradient: bool) -> Samples:
        """Sample the student for some rows of the batch."""
        picks = torch.from_numpy(self.draws.integers("adm/prompt", step, rows, len(self.cond)))
        return simulate_student(self, "adm", picks, step, rows, gradient=gradient)

    def _pair(self, step: int, samples: Samples, *, gradient: bool) -> "_Pair":
        """Noise the samples and take two short steps down the flow: by the teacher and by the fake score."""
        recipe, draws, rows, cond, x_0 = self.recipe, self.draws, samples.rows, samples.cond, samples.x_0
        send = sender(x_0.device)
        low, high = recipe.times
        uniform = draws.uniform("adm/time", step, rows)
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
        with torch.set_grad_enabled(gradient and recipe.jacobian == "full"):
            fake_x0 = self.fake.x0(xt, t, cond)
            x_fake = self._advance(fake_x0, xt, t, s)
        if recipe.jacobian == "detach":
            at, to = spread(t, xt), spread(s, xt)
            x_fake = keep_position(self.teacher.schedule, xt, x_fake, at, to)
        gap = (fake_x0.detach() - real_x0).square().flatten(1).mean(1)
        return _Pair(rows, cond, x_real, x_fake, s, gap)

    def _update_heads(self, step: int, parts: Parts, pairs: "Sequence[_Pair]") -> dict[str, float]:
        """Teach the heads to tell the teacher's steps from the fake score's; return what to log."""
        recipe, logs, judged = self.recipe, Means(), Judged()

        def losses() -> Iterator[Tensor]:
            for pair in pairs:
                share = parts.share(pair.rows)
                # Both sides in one batch, so that the arithmetic's own noise is common to them.
                real, fake = judge(self.latent, pair.x_real, pair.x_fake.detach(), pair.s, pair.cond)
                loss = hinge = discriminator_hinge(real, fake)
                if recipe.r1_weight > 0:
                    drawn = self.draws.normal("adm/r1", step, pair.rows, pair.x_real.shape[1:])
                    noise = recipe.r1_std * sender(pair.x_real.device)(drawn)
                    penalty = shaken(self.latent, pair.x_real, real, pair.s, pair.cond, noise)
                    loss = loss + recipe.r1_weight * penalty
                logs.add(share, latent_hinge=hinge)
                judged.add(real, fake, pair.s)
                yield share * loss

        norm = update(losses(), [self.optimizers["latent"]], recipe.clip, self.ranks)
        return {"heads_norm": norm, **logs, **judged.order(), **judged.accuracy()}

    def _update_student(self, step: int, parts: Parts, pairs: "Sequence[_Pair]") -> dict[str, float]:
        """Move the student to where the discriminator takes its steps for the teacher's; return what to log."""
        logs = Means()

        def losses() -> Iterator[Tensor]:
            for made in pairs:
                pair = made
                if not parts.is_whole:
                    pair = self._pair(step, self._simulate(step, made.rows, gradient=True), gradient=True)
                loss = generator_hinge(self.latent(pair.x_fake, pair.s, pair.cond))
                logs.add(parts.share(pair.rows), student_loss=loss)
                yield parts.share(pair.rows) * loss

        norm = update(losses(), [self.optimizers["student"]], self.recipe.clip, self.ranks)
        return {"student_norm": norm, **logs}

    def _advance(self, x0_hat: Tensor, xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        xs: Tensor = ode_step(self.teacher.schedule, x0_hat, xt, spread(t, xt), spread(s, xt))
        return xs


@dataclass(frozen=True, slots=True)
class _Pair:
    """Some rows of a batch after both short steps, at their times s [b]."""

    rows: range
    cond: Condition
    x_real: Tensor
    x_fake: Tensor
    s: Tensor
    gap: Tensor  # [b] squared distance of the two estimates: the DMD loss
