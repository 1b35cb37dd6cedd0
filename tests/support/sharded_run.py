"""Train the tiny demo teacher's student by processes that share its blocks: python -m support.sharded_run FOLDER

Started by torchrun. Each job is a run in a folder of its own; FOLDER/report.json is what the first process saw.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.pairs.store import Pairs
from flashbulb_distill.ranks import ALONE, Ranks, joined
from flashbulb_distill.sharding import is_shared, own, whole
from flashbulb_distill.teachers.codec import freeze
from flashbulb_distill.teachers.demo import DemoTeacher
from flashbulb_distill.teachers.denoiser import Condition
from flashbulb_distill.teachers.emoji import EmojiDenoiser
from flashbulb_distill.teachers.patch_codec import PatchCodec
from flashbulb_distill.train.build import Inputs, build
from flashbulb_distill.train.guard import Guard, load_bands
from flashbulb_distill.train.probe import Probe
from flashbulb_distill.train.recipe import GuardRecipe, load_recipe
from flashbulb_distill.train.trainer import Method, train

RECIPE = Path(__file__).parents[2] / "distill" / "recipes" / "emoji.yaml"
STAGE = "adm"
STEPS, HALF = 4, 2
SETTINGS = (
    "adm.batch_size=4",
    "adm.warmup_steps=1",
    "adm.taps=[-1,0]",  # the backward pass never meets the network's own output
    "adm.jacobian=full",
    "adm.ida=0.1",
    "adm.carry_heads=false",
    "adm.clip=0.01",  # so that every gradient is clipped by its norm over all ranks
    "adp=null",
    "precision=float32",
    "memory.sharding=fsdp",
    "memory.micro_batch=1",
)
ADAPTERS = ("roles.student=lora", "roles.fake=lora", "lora.rank=2", "adm.ida=0", "memory.checkpointing=true")
Teacher = DemoTeacher[EmojiDenoiser, PatchCodec]


def open_teacher(folder: Path) -> Teacher:
    """Open a tiny teacher without its text encoder, whose place random embeddings take."""
    codec = PatchCodec.from_pretrained(folder, subfolder="codec")

    def load(bf16: bool) -> EmojiDenoiser:
        network = SD3Transformer2DModel.from_pretrained(
            folder, subfolder="transformer", local_files_only=True
        )
        return EmojiDenoiser(network, bf16=bf16)

    return DemoTeacher(folder, freeze(load(False)), freeze(codec), None, None, (64, 8, 8), load)  # type: ignore[arg-type]


def conditions(count: int) -> Condition:
    """Return random embeddings."""
    generator = torch.Generator().manual_seed(3)
    return Condition(*(torch.randn(count, *shape, generator=generator) for shape in ((5, 384), (384,))))


def method_of(teacher: Teacher, ranks: Ranks, *overrides: str) -> Method:
    """Build the method, its large networks shared out where there are several ranks."""
    recipe = load_recipe(RECIPE, [*SETTINGS, *overrides])
    cond = conditions(4)
    generator = torch.Generator().manual_seed(4)
    latents = [torch.randn(6, 64, 8, 8, generator=generator) for _ in range(2)]
    pairs = Pairs(latents[0], latents[1], torch.arange(6) % 3, ("a", "b", "c"))
    uncond = cond.take(torch.tensor([3]))
    return build(STAGE, Inputs(recipe, teacher, cond, uncond, pairs=pairs, ranks=ranks))


def guard_of(teacher: Teacher, ranks: Ranks) -> Guard:
    """Return a guard that looks every second step, at three prompts: ranks cannot share them evenly."""
    cond = conditions(4)
    probe = Probe(
        teacher=teacher.denoiser,
        cond=cond.take(torch.arange(3)),
        uncond=cond.take(torch.tensor([3])),
        latent_shape=(64, 8, 8),
        time_steps=(1.0,),
        guidance=1.5,
        draws=Draws(0),
        seeds=2,
        ranks=ranks,
    )
    return Guard(GuardRecipe(every=HALF), load_bands(None, STAGE), probe)


def run(
    tiny: Path, folder: Path, ranks: Ranks = ALONE, *overrides: str, steps: int = STEPS
) -> dict[str, Any]:
    """Train, going on where the folder is; return what is known of roles afterwards."""
    teacher = open_teacher(tiny)
    frozen = [p.clone() for p in teacher.denoiser.parameters()]
    method = method_of(teacher, ranks, *overrides)
    start = {role: [own(p).clone() for p in m.parameters()] for role, m in method.modules.items()}
    moved: list[str] = []

    def watch(stage: str, step: int, steps: int, logs: dict[str, float]) -> None:
        if step == 1:
            for role, module in method.modules.items():
                pairs = zip(start[role], module.parameters(), strict=True)
                moved.extend([role] * any(not torch.equal(before, own(now)) for before, now in pairs))

    averages = train(
        method,
        folder,
        stage=STAGE,
        steps=steps,
        ema=0.9,
        identity="tiny",
        average_from=1,
        save_every=HALF,
        log_every=1,
        report=watch,
        ranks=ranks,
        guard=guard_of(teacher, ranks),
    )
    now = [whole(p) for p in teacher.denoiser.parameters()]
    parameters = [p for module in method.modules.values() for p in module.parameters()]
    return {
        "moved_at_first": moved,
        "teacher_is_unmoved": all(
            torch.equal(a, b) for a, b in zip(frozen, now[: len(frozen)], strict=False)
        ),
        "gradients_left": sum(p.grad is not None for p in parameters),
        "whole_averages": all(not is_shared(value) for value in averages.values()),
        "shared": {role: _share(list(module.parameters())) for role, module in method.modules.items()},
        "shared_teacher": _share(list(teacher.denoiser.parameters())),
    }


def _share(parameters: list[Tensor]) -> float:
    """Return how much of a network this rank holds."""
    return sum(own(p).numel() for p in parameters) / sum(p.numel() for p in parameters)


def main() -> None:
    """Run all jobs."""
    folder = Path(sys.argv[1])
    tiny = folder / "teacher"
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        report = {"unbroken": run(tiny, folder / "unbroken", ranks)}
        run(tiny, folder / "broken", ranks, steps=HALF)
        run(tiny, folder / "broken", ranks)
        run(tiny, folder / "apart", ranks, steps=HALF)  # goes on alone
        run(tiny, folder / "together", ranks)  # began alone
        report["adapters"] = run(tiny, folder / "adapters", ranks, *ADAPTERS, steps=HALF)
        if ranks.is_first:
            (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
