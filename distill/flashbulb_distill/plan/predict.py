"""Predict what one training step of a recipe's stage holds in memory and computes, by running it on the meta device."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..core.draws import Draws
from ..pairs.store import Pairs
from ..ranks import ALONE, Ranks
from ..teachers.teacher import Teacher
from ..train.build import Inputs, build
from ..train.checkpoint import State, checkpoint_bytes
from ..train.recipe import Recipe, StageRecipe
from ..train.trainer import Method
from ..train.variety import Variants
from .meta import Compute, Meter
from .outline import META, outline
from .shares import Shares, moments_of, tensors_of

PROMPTS, PAIRS = 2, 2  # stand-ins, as few as will do: in a run both lie in the host's memory


@dataclass(frozen=True, slots=True)
class OneOfSeveral(Ranks):
    """One process of several as far as memory goes: its rows are all, but its gradients are copied to be averaged."""

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Take the memory that averaging takes."""
        if gradients:
            torch.cat([gradient.reshape(-1) for gradient in gradients])


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
    where no step was run, since what stays is above the budget already. Of several GPUs it is one's.
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
    checkpoint_bytes: int
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
    recipe: Recipe, stage: str, budget_bytes: int | None = None, *, gpus: int = 1, for_cuda: bool = True
) -> Prediction:
    """Run one step of a stage on the meta device.

    Args:
        budget_bytes: no step is run if what stays is more than this, were the moments in 8 bits.
        gpus: over which the recipe may share networks out; the recipe's batch is then one GPU's rows of it.
        for_cuda: norms in float32 under autocast and the optimisers' grouped arithmetic, as on a GPU.
    Raises:
        RecipeError: the teacher's configuration is not known here.
    """
    meter = Meter()
    with Compute(norms_in_float32=for_cuda), meter:
        teacher = outline(recipe)
        method = build(stage, _inputs(recipe, teacher, OneOfSeveral() if gpus > 1 else ALONE))
        averages = [p.detach().clone() for p in method.modules["student"].parameters()]
        for optimizer in method.optimizers.values():
            _prime(optimizer, grouped=for_cuda)
        networks, optimizers = _networks(teacher, method), method.optimizers
        shares = Shares(networks, gpus if recipe.memory.sharding == "fsdp" else 1)
        own = _resident(shares, networks, optimizers, averages, student=method.modules["student"])
        all_of_it = _resident(
            Shares(networks, 1), networks, optimizers, averages, student=method.modules["student"]
        )
        # Inputs and what is fixed, like positions, belong to what stays as well; they are small.
        before = meter.alive_bytes
        other = max(0, before - all_of_it.total)
        moments = sum(own.optimizer_bytes.values())
        runs = budget_bytes is None or own.total + other - moments * 3 // 4 <= budget_bytes
        meter.start()
        if runs:
            with shares.reduced(list(optimizers.values())):
                method.step(_moving_step(recipe.stages[stage]))
        state = State(method.modules, optimizers, {str(place): p for place, p in enumerate(averages)})
        working = meter.peak_bytes - before
        working = max(working, *(shares.updating_bytes(optimizer) for optimizer in optimizers.values()))
    trained = {role: _trained(optimizer) for role, optimizer in optimizers.items()}
    return Prediction(
        stage=stage,
        batch_size=recipe.stages[stage].batch_size,
        steps=recipe.stages[stage].steps,
        parameters={role: sum(p.numel() for p in network.parameters()) for role, network in networks.items()},
        trainable=trained,
        weight_bytes=own.weight_bytes | {"inputs": other},
        optimizer_bytes=own.optimizer_bytes,
        average_bytes=own.average_bytes,
        gradient_bytes=max(
            sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
            for optimizer in method.optimizers.values()
        ),
        checkpoint_bytes=checkpoint_bytes(state),
        working_bytes=working + shares.gathered_bytes if runs else None,
        step_flops=meter.flops,
    )


def _inputs(recipe: Recipe, teacher: Teacher, ranks: Ranks) -> Inputs:
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
        variants=Variants(teacher.encode(prompts), [[row] for row in range(PROMPTS)]),
        draws=NoNoise,
        ranks=ranks,
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


@dataclass(frozen=True, slots=True)
class _Resident:
    """What stays on one GPU from step to step."""

    weight_bytes: dict[str, int]
    optimizer_bytes: dict[str, int]
    average_bytes: int

    @property
    def total(self) -> int:
        return sum(self.weight_bytes.values()) + sum(self.optimizer_bytes.values()) + self.average_bytes


def _resident(
    shares: Shares,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    averages: Sequence[Tensor],
    *,
    student: nn.Module,
) -> _Resident:
    return _Resident(
        {role: shares.bytes_of(tensors_of(network)) for role, network in networks.items()},
        {role: shares.bytes_of(moments_of(optimizer)) for role, optimizer in optimizers.items()},
        shares.bytes_of(list(zip(averages, student.parameters(), strict=True))),
    )


def _trained(optimizer: Optimizer) -> int:
    return sum(p.numel() for group in optimizer.param_groups for p in group["params"])
