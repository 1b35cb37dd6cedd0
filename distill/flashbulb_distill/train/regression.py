"""Regression on the teacher's ODE pairs: the student learns the endpoint of each pair by its squared error.

Source: rectified flow (Liu et al. 2022, arXiv 2209.03003) on the pairs of ADP: ablation A1 of arXiv 2507.18569. A cheap
start for ADP, since one step of it costs a quarter of one of ADP's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.draws import Draws
from ..core.schedule import add_noise
from ..core.times import biased_times
from ..losses import velocity_loss
from ..pairs.store import DrawnPairs
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser, spread
from .recipe import RegressionRecipe
from .step import Parts, descend, device_of, sender


@dataclass(frozen=True)
class Regression:
    """The student alone, and its update."""

    recipe: RegressionRecipe
    draws: Draws
    pairs: DrawnPairs
    cond: Condition  # one row for each of the pairs' prompts
    student: Denoiser
    optimizers: Mapping[str, Optimizer]
    ranks: Ranks = ALONE
    micro_batch: int | None = None  # rows that are computed at once; None is all

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role."""
        return {"student": self.student}

    def step(self, step: int) -> dict[str, float]:
        """Update the student towards the endpoints of drawn pairs, from points on their straight lines."""
        parts = Parts(self.ranks.rows(self.recipe.batch_size), self.micro_batch)
        loss_of = partial(self._loss, step)
        return descend(loss_of, parts, self.optimizers["student"], self.recipe.clip, self.ranks)

    def _loss(self, step: int, rows: range) -> Tensor:
        """Return the mean loss of some rows of the batch."""
        draws, device = self.draws, device_of(self.student)
        picks = torch.from_numpy(draws.integers("regression/pair", step, rows, self.pairs.known(step)))
        x_0, x_T = self.pairs.x_0[picks].to(device), self.pairs.x_T[picks].to(device)
        cond = self.cond.take(self.pairs.prompt[picks]).to(device)
        uniform = draws.uniform("regression/time", step, rows)
        t = sender(device)(biased_times(uniform, self.recipe.time_power)).float()
        xt = add_noise("rectified-flow", x_0, x_T, spread(t, x_0))
        return velocity_loss(self.student.x0(xt, t, cond), x_0, t)
