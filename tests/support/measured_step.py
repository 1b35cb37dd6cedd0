"""What a stage's training step takes from the CPU's allocator: alone, or as one of torchrun's processes.

python -m torch.distributed.run --nproc-per-node 2 -m support.measured_step RECIPE STAGE OUT [KEY=VALUE ...]
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from flashbulb_distill.pairs.store import Pairs
from flashbulb_distill.ranks import ALONE, Ranks, joined
from flashbulb_distill.sharding import own
from flashbulb_distill.teachers.open import open_teacher
from flashbulb_distill.train.build import Inputs, build
from flashbulb_distill.train.recipe import Recipe, load_recipe


def measured(recipe: Recipe, stage: str, ranks: Ranks = ALONE) -> dict[str, int]:
    """Run a stage's step twice; return bytes of this process.

    working: the peak of the second step beyond what was there before it, counted by torch's profiler.
    weights, moments: what it keeps of teacher, trained networks and optimisers.
    """
    teacher = open_teacher(
        recipe.family, recipe.teacher, shape=recipe.shape, bf16=recipe.precision == "bfloat16"
    )
    prompts = ["a red dog", "dog"]
    pairs = None
    if recipe.pairs is not None:
        latents = torch.randn(8, *teacher.latent_shape)
        pairs = Pairs(latents, latents, torch.zeros(8, dtype=torch.int64), tuple(prompts))
    inputs = Inputs(recipe, teacher, teacher.encode(prompts), teacher.encode_uncond(), pairs, ranks=ranks)
    method = build(stage, inputs)
    moving = recipe.stages[stage].average_from
    method.step(moving)  # the optimisers' states are there after it
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        method.step(moving)
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            alive += event.nbytes()
            peak = max(peak, alive)
    states = [state for optimizer in method.optimizers.values() for state in optimizer.state.values()]
    moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    networks: list[nn.Module] = [teacher.denoiser, *method.modules.values()]
    return {
        "working": peak,
        "weights": sum(own(t).nbytes for n in networks for t in [*n.parameters(), *n.buffers()]),
        "moments": sum(own(value).nbytes for value in moments),
    }


def main() -> None:
    """Measure what the command line says; the first process writes OUT."""
    path, stage, out, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        told = measured(load_recipe(Path(path), overrides), stage, ranks)
        if ranks.is_first:
            Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
