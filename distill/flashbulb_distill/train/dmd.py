"""Distribution matching distillation: the student moves down the difference of two scores, the teacher's and its own.

Source: DMD (Yin et al. 2023, arXiv 2311.18828) without its regression, as ablations B2 and B3 of arXiv 2507.18569; with
`gan_weight` DMD2 (Yin et al. 2024, arXiv 2405.14867). Two differences from DMD2: its discriminator reads the fake
score's features and trains them, ours reads the frozen teacher's through heads, as ADM's does; its real pictures come
from a data set, ours are the endpoints of the teacher's ODE pairs, so that every method here learns from the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import add_noise
from ..core.times import adm_times
from ..losses import discriminator_softplus, dmd_gradient, dmd_loss, generator_softplus
from ..pairs.store import DrawnPairs
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser, guided_x0, spread
from .fake import Samples, pull, update_fake
from .recipe import DmdRecipe
from .simulate import simulate_student
from .step import Judged, Means, Parts, judge, sender, shaken, update


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
    pairs: DrawnPairs | None = None
    ranks: Ranks = ALONE
    micro_batch: int | None = None  # rows that are computed at once; None is all

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role."""
        latent = {} if self.latent is None else {"latent": self.latent}
        return {"student": self.student, "fake": self.fake, **latent}

    def step(self, step: int) -> dict[str, float]:
        """Update the fake score and the heads, and the student after the warm-up, every `update_ratio` steps."""
        recipe = self.recipe
        parts = Parts(self.ranks.rows(recipe.batch_size), self.micro_batch)
        moves = step >= recipe.warmup_steps and step % recipe.update_ratio == 0
        samples = [self._simulate(step, part, gradient=moves and parts.is_whole) for part in parts]
        logs = update_fake(
            self.fake,
            self.optimizers["fake"],
            samples,
            draws=self.draws,
            purpose="dmd",
            step=step,
            updates=recipe.fake_updates,
            clip=recipe.clip,
            ranks=self.ranks,
        )
        if self.latent is not None and self.pairs is not None:
            logs |= self._update_heads(step, parts, samples, self.latent, self.pairs)
        if moves:
            logs |= self._update_student(step, parts, samples)
            if recipe.ida > 0:
                pull(self.fake, self.student, recipe.ida)
        return logs

    def _simulate(self, step: int, rows: range, *, gradient: bool) -> Samples:
        """Sample the student for some rows of the batch; with the GAN term for the prompts of drawn pairs."""
        if self.pairs is None:
            picks = torch.from_numpy(self.draws.integers("dmd/prompt", step, rows, len(self.cond)))
        else:
            picks = self.pairs.prompt[self._picks(step, rows, self.pairs)]
        return simulate_student(self, "dmd", picks, step, rows, gradient=gradient)

    def _picks(self, step: int, rows: range, pairs: DrawnPairs) -> Tensor:
        return torch.from_numpy(self.draws.integers("dmd/pair", step, rows, pairs.known(step)))

    def _noised(self, step: int, rows: range, *pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the heads' times [b], and pictures [b, ...] of these rows, noised alike to them."""
        send, like = sender(pictures[0].device), pictures[0]
        s = send(self.draws.uniform("dmd/latent-time", step, rows)).float()
        eps = send(self.draws.normal("dmd/latent-noise", step, rows, like.shape[1:]))
        return s, [add_noise(self.teacher.schedule, x, eps, spread(s, like)) for x in pictures]

    def _update_heads(
        self, step: int, parts: Parts, samples: Sequence[Samples], latent: nn.Module, pairs: DrawnPairs
    ) -> dict[str, float]:
        """Teach the heads to tell the pairs' endpoints from the student's pictures of one prompt."""
        recipe, logs, judged = self.recipe, Means(), Judged()

        def losses() -> Iterator[Tensor]:
            for made in samples:
                share, x_0 = parts.share(made.rows), made.x_0.detach()
                endpoints = pairs.x_0[self._picks(step, made.rows, pairs)].to(x_0.device)
                s, (real_x, fake_x) = self._noised(step, made.rows, endpoints, x_0)
                real, fake = judge(latent, real_x, fake_x, s, made.cond)
                loss = gan = discriminator_softplus(real, fake)
                if recipe.r1_weight > 0:
                    drawn = self.draws.normal("dmd/r1", step, made.rows, x_0.shape[1:])
                    noise = recipe.r1_std * sender(x_0.device)(drawn)
                    loss = loss + recipe.r1_weight * shaken(latent, real_x, real, s, made.cond, noise)
                logs.add(share, latent_loss=gan)
                judged.add(real, fake, s)
                yield share * loss

        norm = update(losses(), [self.optimizers["latent"]], recipe.clip, self.ranks)
        return {"heads_norm": norm, **logs, **judged.accuracy()}

    def _update_student(self, step: int, parts: Parts, samples: Sequence[Samples]) -> dict[str, float]:
        """Move the student down the difference of the two scores; return what to log."""
        recipe, draws, logs = self.recipe, self.draws, Means()
        low, high = recipe.time_range

        def losses() -> Iterator[Tensor]:
            for first in samples:
                made = first if parts.is_whole else self._simulate(step, first.rows, gradient=True)
                rows, cond, x_0 = made.rows, made.cond, made.x_0
                send, share = sender(x_0.device), parts.share(rows)
                t = send(adm_times(draws.uniform("dmd/time", step, rows), low=low, high=high)).float()
                eps = send(draws.normal("dmd/noise", step, rows, x_0.shape[1:]))
                with torch.no_grad():
                    xt = add_noise(self.teacher.schedule, x_0, eps, spread(t, x_0))
                    x0_real = guided_x0(self.teacher, xt, t, cond, self.uncond, recipe.guidance)
                    x0_fake = self.fake.x0(xt, t, cond)
                loss = dmd_loss(x_0, dmd_gradient(x_0, x0_fake, x0_real))
                logs.add(share, dmd=(x0_fake - x0_real).square().mean(), student_loss=loss)
                if self.latent is not None:
                    s, (noised,) = self._noised(step, rows, x_0)
                    loss = loss + recipe.gan_weight * generator_softplus(self.latent(noised, s, cond))
                yield share * loss

        norm = update(losses(), [self.optimizers["student"]], recipe.clip, self.ranks)
        return {**logs, "student_norm": norm}
