"""The race on a mixture of Gaussians in the plane: the teacher's score is exact, and so is what a student misses.

A student is a network of three hidden layers that starts as a student of pictures does, as the teacher: it is first
trained to denoise, here towards the exact posterior mean.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ..core.draws import BatchDraws
from ..core.schedule import add_noise
from ..evaluate.features import Images
from ..evaluate.grid import save_grid
from ..losses import velocity_loss
from ..pairs.generate import sample_teacher
from ..pairs.store import Pairs
from ..teachers.denoiser import spread
from ..train.build import load_parameters
from ..train.trainer import train
from .course import COLUMNS, Course, Figures, judge_points
from .entries import Entry
from .picture import draw_points
from .points import NO_PROMPT, SHAPE, Weights, build_for_points, point_network
from .result import RaceResult, RunResult, race_table

Report = Callable[[str, int, int], None]
TEACHER_STEPS = 50


class MixtureRace:
    """One seed's start, pairs and samples, shared by its entries."""

    def __init__(self, course: Course, seed: int) -> None:
        self.course, self.seed = course, seed
        self.teacher, self.draws = course.teacher(), BatchDraws(seed)
        noise = torch.from_numpy(self.draws.normal("race/pairs", 0, range(course.num_pairs), SHAPE))
        x_0 = sample_teacher(self.teacher, noise, NO_PROMPT, NO_PROMPT, num_steps=TEACHER_STEPS, guidance=1.0)
        self.pairs = Pairs(noise, x_0, torch.zeros(len(noise), dtype=torch.int64), ("",))
        self.start = self._start()

    def _start(self) -> Weights:
        """Train the network to be the teacher: the estimate E[x0 | xt] at every time."""
        torch.manual_seed(self.seed)
        network, generator = point_network(self.course), torch.Generator().manual_seed(self.seed)
        optimizer = AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
        for step in range(self.course.start_steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / self.course.start_steps)
            picks = torch.randint(self.course.num_modes, (256,), generator=generator)
            x_0 = self.teacher.sample(torch.randn(256, *SHAPE, generator=generator), picks)
            t = torch.rand(256, generator=generator).clamp(min=1e-3)
            xt = add_noise("rectified-flow", x_0, torch.randn(x_0.shape, generator=generator), spread(t, x_0))
            loss = velocity_loss(network(xt, t, NO_PROMPT), self.teacher(xt, t, NO_PROMPT), t)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: parameter.detach() for name, parameter in network.named_parameters()}

    def run(self, entry: Entry, report: Report) -> tuple[Tensor, float]:
        """Train an entry from the start; return its points [n, 2] and its seconds of CPU."""
        weights, began = self.start, time.process_time()
        heads: Weights = {}
        moves = self.course.moves // len(entry.stages)
        with TemporaryDirectory() as scratch:
            for stage in entry.stages:
                method, warmup = build_for_points(
                    stage, self.course, self.seed, self.pairs, self.start, weights
                )
                if entry.carry_heads and heads:
                    load_parameters(method.modules["latent"], heads)
                weights = train(
                    method,
                    Path(scratch) / stage,
                    stage=stage,
                    steps=moves + warmup,
                    ema=self.course.ema,
                    identity=stage,
                    average_from=warmup,
                    save_every=10**9,
                    log_every=100,
                    report=lambda stage, step, steps, logs: report(
                        f"seed {self.seed} {entry.name} {stage}", step, steps
                    ),
                )
                heads = dict(method.modules.get("latent", nn.Identity()).named_parameters())
        return self.sample(weights), time.process_time() - began

    @torch.no_grad()
    def sample(self, weights: Weights) -> Tensor:
        """Return one-step samples [n, 2] from noise that training never saw."""
        noise = self._normal("race/samples")
        student = point_network(self.course, weights)
        return student.x0(noise, torch.ones(len(noise)), NO_PROMPT).flatten(1)

    def judge(self, points: Tensor) -> Figures:
        """Measure points [n, 2] against exact samples of the teacher."""
        rows = range(self.course.num_samples)
        picks = torch.from_numpy(self.draws.integers("race/modes", 0, rows, self.course.num_modes))
        real = self.teacher.sample(self._normal("race/real"), picks).flatten(1)
        return judge_points(points.double().numpy(), real.double().numpy(), self.course)

    def _normal(self, purpose: str) -> Tensor:
        return torch.from_numpy(self.draws.normal(purpose, 0, range(self.course.num_samples), SHAPE))


def race_on_mixture(
    course: Course,
    entries: Sequence[Entry],
    seeds: Sequence[int],
    out: Path,
    *,
    provenance: Mapping[str, str],
    report: Report,
) -> RaceResult:
    """Run all entries with all seeds; write race.json, table.md and points.png to the folder `out`.

    The table ends with the student that all start from, and the teacher's ODE endpoints that they learn from.
    """
    runs: list[RunResult] = []
    rows: list[tuple[str, list[Images]]] = []
    for seed in seeds:
        race = MixtureRace(course, seed)
        found = [(entry.name, entry.title, *race.run(entry, report)) for entry in entries]
        found.append(("start", "the student before any of them", race.sample(race.start), 0.0))
        found.append(
            ("teacher", f"{TEACHER_STEPS} Euler steps of the exact score", race.pairs.x_0.flatten(1), 0.0)
        )
        for name, title, points, seconds in found:
            figures = {key: float(value) for key, value in asdict(race.judge(points)).items()}
            runs.append(RunResult(entry=name, title=title, seed=seed, cpu_seconds=seconds, figures=figures))
        rows.append((f"seed {seed}", [draw_points(points.double().numpy(), 3.0) for *_, points, _ in found]))
    result = RaceResult(
        on="mixture", course=asdict(course), seeds=tuple(seeds), runs=tuple(runs), provenance=dict(provenance)
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "race.json").write_text(result.model_dump_json(indent=1) + "\n")
    (out / "table.md").write_text(race_table(result, COLUMNS))
    names = [entry.name for entry in entries] + ["start", "teacher"]
    save_grid(rows, names, out / "points.png", scale=1, max_columns=len(names))
    return result
