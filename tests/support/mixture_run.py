"""Train on the mixture, as one or several processes: python -m support.mixture_run FOLDER [--kill-at N] [--wait-at N]

Started by tests as a process of its own: by torchrun for several ranks, and killed by itself for the resume test.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.networks.discriminators import VectorDiscriminator
from flashbulb_distill.networks.point import PointDenoiser
from flashbulb_distill.pairs.generate import generate_pairs
from flashbulb_distill.ranks import Ranks, joined
from flashbulb_distill.teachers.denoiser import Condition
from flashbulb_distill.teachers.mixture import MixtureDenoiser, ring
from flashbulb_distill.train.adm import Adm
from flashbulb_distill.train.recipe import AdmRecipe, Rates
from flashbulb_distill.train.trainer import train

STEPS = 24
NO_PROMPT = Condition(torch.zeros(1, 1, 1), torch.zeros(1, 1))


def main() -> None:
    """Read the options, and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--wait-at", type=int, help="until SIGTERM comes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        distil(args.folder, args.kill_at, args.wait_at, ranks)


def distil(folder: Path, kill_at: int | None, wait_at: int | None, ranks: Ranks) -> None:
    """Make pairs and train; kill this process at a step, or wait there for a signal."""
    teacher = MixtureDenoiser(ring(4), 0.2)
    generate_pairs(
        folder / "pairs",
        teacher,
        ("a", "b"),
        Condition(torch.zeros(2, 1, 1), torch.zeros(2, 1)),
        NO_PROMPT,
        latent_shape=(2, 1, 1),
        count=29,
        num_steps=3,
        guidance=1.0,
        draws=Draws(0),
        batch_size=4,
        ranks=ranks,
    )
    torch.manual_seed(0)
    networks = {"student": PointDenoiser(2), "fake": PointDenoiser(2), "latent": VectorDiscriminator(2)}
    optimizers = {
        r: torch.optim.AdamW(n.parameters(), lr=1e-3, betas=(0.0, 0.99)) for r, n in networks.items()
    }
    recipe = AdmRecipe(
        steps=STEPS,
        batch_size=16,
        rates=Rates(student=1e-3, heads=1e-3, fake=1e-3),
        taps=(-1,),
        guidance=1.0,
        delta_t=1 / 8,
        time_range=(0.1, 0.9),
        warmup_steps=2,
    )
    method = Adm(
        recipe=recipe,
        draws=Draws(0),
        cond=NO_PROMPT,
        uncond=NO_PROMPT,
        latent_shape=(2, 1, 1),
        time_steps=(1.0, 0.5),
        teacher=teacher,
        optimizers=optimizers,
        ranks=ranks,
        **networks,  # type: ignore[arg-type]
    )

    def report(stage: str, step: int, steps: int, logs: dict[str, float]) -> None:
        if kill_at is not None and step >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if wait_at is not None and step >= wait_at:
            (folder / "waiting").touch()
            signal.pause()  # the trainer notes the signal, and stops after this step

    options = {
        "stage": "adm",
        "steps": STEPS,
        "ema": 0.9,
        "identity": "mixture",
        "save_every": 5,
        "log_every": 3,
    }
    train(method, folder, average_from=2, report=report, ranks=ranks, **options)  # type: ignore[arg-type]
    if ranks.is_first:
        (folder / "ranks.json").write_text(json.dumps(ranks.count))


if __name__ == "__main__":
    main()
