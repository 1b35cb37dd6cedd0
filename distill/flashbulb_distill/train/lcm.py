"""Latent consistency distillation: along the teacher's flow, the student says the same from every point.

Source: Luo et al. 2023 (LCM, arXiv 2310.04378); data are the endpoints of the teacher's ODE pairs, with fresh noise.
The boundary condition f(x, 0) = x holds by definition here: at t = 0 nothing is asked of the network. LCM's own c_skip
and c_out, with its times scaled by 10, differ from that by less than 1e-5 at the first time of a grid of 50.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import add_noise, ode_step
from ..losses import pseudo_huber
from ..pairs.store import DrawnPairs
from ..ranks import ALONE, Ranks
from ..sharding import own
from ..teachers.denoiser import Condition, Denoiser, guided_x0, spread
from .recipe import LcmRecipe
from .step import Parts, descend, device_of, sender


@dataclass(frozen=True)
class Lcm:
    """The student, its slowly following copy that sets the target, and their updates."""

    recipe: LcmRecipe
    draws: Draws
    pairs: DrawnPairs
    cond: Condition  # one row for each of the pairs' prompts
    uncond: Condition  # the empty prompt
    teacher: Denoiser
    student: Denoiser
    target: Denoiser
    optimizers: Mapping[str, Optimizer]
    ranks: Ranks = ALONE
    micro_batch: int | None = None  # rows that are computed at once; None is all

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The networks that a step changes, by role; the target has no optimiser."""
        return {"student": self.student, "target": self.target}

    def step(self, step: int) -> dict[str, float]:
        """Update the student towards its target one grid step closer to the data, then let the target follow."""
        recipe = self.recipe
        parts = Parts(self.ranks.rows(recipe.batch_size), self.micro_batch)
        loss_of = partial(self._loss, step)
        logs = descend(loss_of, parts, self.optimizers["student"], recipe.clip, self.ranks)
        with torch.no_grad():
            for target, student in zip(self.target.parameters(), self.student.parameters(), strict=True):
                own(target).lerp_(own(student), 1 - recipe.target_ema)
        return logs

    def _loss(self, step: int, rows: range) -> Tensor:
        """Return the mean loss of some rows of the batch."""
        recipe, draws, device = self.recipe, self.draws, device_of(self.student)
        send = sender(device)
        picks = torch.from_numpy(draws.integers("lcm/pair", step, rows, self.pairs.known(step)))
        x_0 = self.pairs.x_0[picks].to(device)
        cond = self.cond.take(self.pairs.prompt[picks]).to(device)

        index = send(draws.integers("lcm/time", step, rows, recipe.num_times))
        t, s = (index + 1).float() / recipe.num_times, index.float() / recipe.num_times
        eps = send(draws.normal("lcm/noise", step, rows, x_0.shape[1:]))
        at, to = spread(t, x_0), spread(s, x_0)
        xt = add_noise(self.teacher.schedule, x_0, eps, at)
        with torch.no_grad():
            guess = guided_x0(self.teacher, xt, t, cond, self.uncond, recipe.guidance)
            xs = ode_step(self.teacher.schedule, guess, xt, at, to)
            # A network need not be defined at t = 0, where the answer is the point itself.
            said = self.target.x0(xs, s.clamp(min=0.5 / recipe.num_times), cond)
            target = torch.where(to > 0, said, xs)
        return pseudo_huber(self.student.x0(xt, t, cond), target, c=recipe.huber)
