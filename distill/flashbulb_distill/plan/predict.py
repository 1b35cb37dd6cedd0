"""Predict what one training step of a recipe's stage holds in memory and computes, by running it on the meta device."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.optim import AdamW, Optimizer

from ..core.draws import Draws
from ..pairs.store import Pairs
from ..teachers.teacher import Teacher
from ..train.build import Inputs, build
from ..train.recipe import Recipe, StageRecipe
from ..train.trainer import Method
from .meta import Compute, Meter
from .outline import META, outline

PROMPTS = 64  # stand-ins; embeddings lie in the host's memory
PAIRS = 256


class NoNoise(Draws):
    """Draws whose normal numbers are zeros: the meta device keeps no values, and drawing a video's takes seconds.

    What decides the work of a step, like the number of simulated steps, is drawn as ever.
    """

    def normal(
        self, purpose: str, step: int, samples: Iterable[int], shape: Sequence[int]
    ) -> NDArray[np.float32]:
        """Return zeros, float32 [samples, *shape]."""
        return np.zeros((len(list(samples)), *shape), np.float32)


class Prediction(BaseModel):
    """What a stage's step needs on its device, bytes, and computes.

    `working_bytes` is the peak beyond what stays: activations, gradients, casts, the optimiser's temporaries; None
    where no step was run, since what stays is above the budget already.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    batch_size: int
    steps: int
    parameters: dict[str, int]
    trainable: dict[str, int]
    weight_bytes: dict[str, int]
    optimizer_bytes: dict[str, int]
    average_bytes: int
    gradient_bytes: int
    working_bytes: int | None
    step_flops: int

    @property
    def resident_bytes(self) -> int:
        """What stays from step to step."""
        return sum(self.weight_bytes.values()) + sum(self.optimizer_bytes.values()) + self.average_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at a time."""
        return self.resident_bytes + (self.working_bytes or 0)


def predict(
    recipe: Recipe, stage: str, budget_bytes: int | None = None, *, for_cuda: bool = True
) -> Prediction:
    """Run one step of a stage on the meta device.

    Args:
        budget_bytes: no step is run if what stays is more than this, were the moments in 8 bits.
        for_cuda: norms in float32 under autocast and the optimisers' grouped arithmetic, as on a GPU.
    Raises:
        RecipeError: the teacher's configuration is not known here.
    """
    meter = Meter()
    with Compute(norms_in_float32=for_cuda), meter:
        teacher = outline(recipe)
        method = build(stage, _inputs(recipe, teacher))
        averages = [p.detach().clone() for p in method.modules["student"].parameters()]
        for optimizer in method.optimizers.values():
            _prime(optimizer, grouped=for_cuda)
        resident = meter.alive_bytes
        meter.start()
        moments = sum(_state_bytes(optimizer) for optimizer in method.optimizers.values())
        runs = budget_bytes is None or resident - moments * 3 // 4 <= budget_bytes
        if runs:
            method.step(_moving_step(recipe.stages[stage]))
        peak, flops = meter.peak_bytes, meter.flops
    networks = _networks(teacher, method)
    trained = {role: _trained(optimizer) for role, optimizer in method.optimizers.items()}
    weight_bytes = {role: _bytes(network) for role, network in networks.items()}
    optimizer_bytes = {role: _state_bytes(optimizer) for role, optimizer in method.optimizers.items()}
    average_bytes = sum(average.nbytes for average in averages)
    # Inputs and what is fixed, like positions, belong to what stays as well; they are small.
    other = max(0, resident - sum(weight_bytes.values()) - sum(optimizer_bytes.values()) - average_bytes)
    return Prediction(
        stage=stage,
        batch_size=recipe.stages[stage].batch_size,
        steps=recipe.stages[stage].steps,
        parameters={role: sum(p.numel() for p in network.parameters()) for role, network in networks.items()},
        trainable=trained,
        weight_bytes=weight_bytes | {"inputs": other},
        optimizer_bytes=optimizer_bytes,
        average_bytes=average_bytes,
        gradient_bytes=max(
            sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
            for optimizer in method.optimizers.values()
        ),
        working_bytes=peak - resident if runs else None,
        step_flops=flops,
    )


def _inputs(recipe: Recipe, teacher: Teacher) -> Inputs:
    prompts = [f"prompt {number}" for number in range(PROMPTS)]
    pairs = None
    if recipe.pairs is not None:
        latents = torch.zeros(PAIRS, *teacher.latent_shape, device="meta")
        rows = torch.zeros(PAIRS, dtype=torch.int64)
        pairs = Pairs(latents, latents, rows, tuple(prompts))
    return Inputs(
        recipe=recipe,
        teacher=teacher,
        cond=teacher.encode(prompts),
        uncond=teacher.encode_uncond().to(META),
        pairs=pairs,
        draws=NoNoise,
    )


def _prime(optimizer: Optimizer, *, grouped: bool) -> None:
    """Give an optimiser the state that it has after its first step."""
    assert type(optimizer) is AdamW, (
        "what the recipes train with; a step would tell, but takes long on large networks"
    )
    for group in optimizer.param_groups:
        group["foreach"] = grouped
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _moving_step(section: StageRecipe) -> int:
    """Return a step at which the student moves too: the dearest kind."""
    ratio = getattr(section, "update_ratio", 1)
    return -(-section.average_from // ratio) * ratio


def _networks(teacher: Teacher, method: Method) -> Mapping[str, nn.Module]:
    networks: dict[str, nn.Module] = {"teacher": teacher.denoiser, **method.modules}
    if getattr(method, "decode", None) is not None and isinstance(teacher.codec, nn.Module):
        networks["codec"] = teacher.codec
    return networks


def _bytes(network: nn.Module) -> int:
    return sum(t.nbytes for t in [*network.parameters(), *network.buffers()])


def _trained(optimizer: Optimizer) -> int:
    return sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def _state_bytes(optimizer: Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
