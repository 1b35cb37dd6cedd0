"""One iteration of ADM beside its own forward and backward passes: no hidden copies, encodings or second passes.

    python -m benchmarks step_budget [--recipe distill/recipes/emoji.yaml] [--rounds 9] [--write]

The passes are written out here once more, in plain code on inputs of the same shapes, and timed one by one; the whole
iteration is the library's. CPU time of one thread, medians over rounds in which all sides take their turns.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import rig
import torch
from torch import Tensor

from flashbulb_distill.teachers.denoiser import Condition, join
from flashbulb_distill.teachers.open import open_teacher
from flashbulb_distill.train.adm import Adm
from flashbulb_distill.train.build import Inputs, build
from flashbulb_distill.train.recipe import load_recipe

NAME = "step_budget"
WARM_UP = 2
PROMPTS = 32
BUDGET = 1.15


def passes(method: Adm) -> dict[str, Callable[[], object]]:
    """Return the passes that one iteration with one student step consists of, by name."""
    b, shape = method.recipe.batch_size, method.latent_shape
    xt, t = torch.randn(b, *shape), torch.rand(b) * 0.9 + 0.05
    cond = method.cond.take(torch.arange(b) % len(method.cond))
    guided = join(cond, method.uncond.expand(b))
    twice = join(cond, cond)
    student, fake = list(method.student.parameters()), list(method.fake.parameters())
    heads = list(method.latent.parameters())

    def through(network: torch.nn.Module, parameters: list[Tensor]) -> object:
        return torch.autograd.grad(network(xt, t, cond).square().mean(), parameters, allow_unused=True)

    @torch.no_grad()
    def forward(network: torch.nn.Module, x: Tensor, at: Tensor, c: Condition) -> object:
        return network(x, at, c)

    def discriminator() -> object:
        logits = method.latent(torch.cat([xt, xt]), torch.cat([t, t]), twice)
        return torch.autograd.grad(logits.square().mean(), heads)

    def generator() -> object:
        x = xt.clone().requires_grad_()
        return torch.autograd.grad(method.latent(x, t, cond).mean(), [x])

    return {
        "student: forward, backward": lambda: through(method.student, student),
        "fake score: forward, backward": lambda: through(method.fake, fake),
        "teacher: forward of two, guided": lambda: forward(
            method.teacher, torch.cat([xt, xt]), torch.cat([t, t]), guided
        ),
        "fake score: forward": lambda: forward(method.fake, xt, t, cond),
        "discriminator: forward of two, heads' backward": discriminator,
        "discriminator: forward, backward to its input": generator,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Time the iteration and its passes by turns, print the ratio, and write a file where asked to."""
    parser = rig.plain_arguments(__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("distill/recipes/emoji.yaml"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = load_recipe(options.recipe, ["precision=float32", "time_steps=[1.0]", "adm.warmup_steps=0"])
    teacher = open_teacher(recipe.family, recipe.teacher)
    cond = teacher.encode(recipe.prompts.read_text().splitlines()[:PROMPTS])
    method = build("adm", Inputs(recipe, teacher, cond, teacher.encode_uncond()))
    assert isinstance(method, Adm)
    sides: dict[str, Callable[[], object]] = {"iteration": lambda: None, **passes(method)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds + WARM_UP):
        sides["iteration"] = lambda turn=turn: method.step(turn)  # type: ignore[misc]
        for place in range(len(sides)):
            name = list(sides)[(place + turn) % len(sides)]
            started = time.process_time()
            sides[name]()
            if turn >= WARM_UP:
                times[name].append((time.process_time() - started) * 1000)
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    own = sum(value for name, value in medians.items() if name != "iteration")
    result = {
        "torch": torch.__version__,
        "recipe": str(options.recipe),
        "batch_size": method.recipe.batch_size,
        "rounds": options.rounds,
        "cpu_ms": medians,
        "sum_of_passes_ms": round(own, 1),
        "iteration_over_passes": round(medians["iteration"] / own, 3),
        "budget": BUDGET,
    }
    rig.finish(NAME, result, write=options.write, out=options.out)


if __name__ == "__main__":
    main()
