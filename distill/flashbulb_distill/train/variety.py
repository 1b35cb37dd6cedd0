"""Variety for prompts that leave it open: by its noise a picture is of one of the prompt's variants.

One-step students lose what their teacher draws seldom: where a prompt leaves the style open, a rare style is lost to
the mean of its neighbours, while prompts that name it still show it. So the student learns its own pictures of the
named variants under the open prompt, and a `NoiseCode` tells it which of them a noise stands for. Prompts without
variants learn what they drew before. No teacher is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.draws import Draws
from ..ranks import ALONE, Ranks
from ..teachers.denoiser import Condition, Denoiser
from ..teachers.noise_code import place_of
from .recipe import RecipeError, VarietyRecipe
from .step import Parts, descend, device_of


def load_variants(path: Path, prompts: Sequence[str]) -> dict[str, list[str]]:
    """Read a table of prompts' variants.

    Raises:
        RecipeError: no such file, not of this form, or a prompt that is not trained.
    """
    try:
        table = TypeAdapter(dict[str, Annotated[list[str], Field(min_length=1)]]).validate_json(
            path.read_bytes()
        )
    except FileNotFoundError:
        raise RecipeError(f"variety.variants: expected a JSON file of prompts, found no {path}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"variety.variants: expected prompt -> its variants in {path}, got {first['msg']}"
        ) from error
    if unknown := sorted(table.keys() - set(prompts)):
        raise RecipeError(f"variety.variants: expected training prompts, got {unknown[0]!r} in {path}")
    return table


@dataclass(frozen=True)
class Variants:
    """What each prompt may stand for: rows of `cond` among which its noise chooses; its own where it has none."""

    cond: Condition
    rows: Sequence[Sequence[int]]

    @cached_property
    def _counts(self) -> Tensor:
        return torch.tensor([len(rows) for rows in self.rows])

    @cached_property
    def _table(self) -> Tensor:
        """The rows of each prompt [prompts, most], the last one repeated."""
        most = int(self._counts.max())
        return torch.tensor([[*rows, *[rows[-1]] * (most - len(rows))] for rows in self.rows])

    def chosen(self, prompts: Tensor, places: Tensor) -> Condition:
        """Return the variants of prompts [b] that noises at places [b] stand for, each as likely as the others."""
        counts = self._counts[prompts]
        picks = (places.double() * counts).long().clamp(max=counts - 1)
        return self.cond.take(self._table[prompts, picks])


@dataclass(frozen=True)
class Variety:
    """The student, itself as it was before, and its update."""

    recipe: VarietyRecipe
    draws: Draws
    cond: Condition  # one row for each training prompt
    variants: Variants
    latent_shape: tuple[int, ...]
    before: Denoiser  # the student that it starts from, frozen
    student: Denoiser
    optimizers: Mapping[str, Optimizer]
    ranks: Ranks = ALONE
    micro_batch: int | None = None  # rows that are computed at once; None is all

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The trained networks by role."""
        return {"student": self.student}

    def step(self, step: int) -> dict[str, float]:
        """Update the student towards its earlier pictures of what drawn prompts and noises stand for."""
        parts = Parts(self.ranks.rows(self.recipe.batch_size), self.micro_batch)
        loss_of = partial(self._loss, step)
        return descend(loss_of, parts, self.optimizers["student"], self.recipe.clip, self.ranks)

    def _loss(self, step: int, rows: range) -> Tensor:
        """Return the mean squared error of some rows of the batch."""
        draws, device = self.draws, device_of(self.student)
        prompts = torch.from_numpy(draws.integers("variety/prompt", step, rows, len(self.variants.rows)))
        drawn = torch.from_numpy(draws.normal("variety/noise", step, rows, self.latent_shape))
        chosen = self.variants.chosen(prompts, place_of(drawn)).to(device)
        noise, t = drawn.to(device), torch.ones(len(rows), device=device)
        with torch.no_grad():
            target = self.before.x0(noise, t, chosen)
        asked = self.cond.take(prompts).to(device)
        return (self.student.x0(noise, t, asked) - target).square().mean()
