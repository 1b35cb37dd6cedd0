"""Which way of training a stage fits a GPU, and why: strategies in order of preference, each predicted."""

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from flashbulb_kernels.gpus import GPUS

from ..train.recipe import Recipe, StageRecipe
from .predict import Prediction

GIB = 2**30
CONTEXT_BYTES = 6 * GIB // 10  # what CUDA and its libraries take; an assumption
FRAGMENTATION = 0.05  # of the memory that the allocator cannot use; an assumption
UTILISATION = 0.35  # of a GPU's peak that training reaches; an assumption
LEAST_BATCH = 2  # the hinge compares two samples


class Strategy(BaseModel):
    """Changes of a recipe that need less memory, and what they cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    roles: tuple[Literal["full", "lora"], Literal["full", "lora"]]  # student, fake score
    checkpointing: bool
    eight_bit: bool = False
    cost: str

    def apply(self, recipe: Recipe, stage: str, batch_size: int) -> Recipe:
        """Return the recipe with this strategy, with Adam in 32 bits: 8 bits are not run on the meta device."""
        section = recipe.stages[stage].model_copy(update={"batch_size": batch_size})
        if hasattr(section, "pixel_batch"):
            section = section.model_copy(update={"pixel_batch": min(section.pixel_batch, batch_size)})
        roles = recipe.roles.model_copy(update={"student": self.roles[0], "fake": self.roles[1]})
        memory = recipe.memory.model_copy(update={"checkpointing": self.checkpointing, "optimizer": "adamw"})
        return recipe.model_copy(update={stage: section, "roles": roles, "memory": memory})

    def suits(self, section: StageRecipe) -> bool:
        """Tell whether a stage can be trained so: IDA mixes weights of student and fake score, of one kind then."""
        return self.roles[0] == self.roles[1] or not getattr(section, "ida", 0)

    def overrides(self, stage: str, batch_size: int) -> tuple[str, ...]:
        """Return what to pass to `--set` for it."""
        return (
            f"roles.student={self.roles[0]}",
            f"roles.fake={self.roles[1]}",
            f"memory.checkpointing={str(self.checkpointing).lower()}",
            f"memory.optimizer={'adamw8bit' if self.eight_bit else 'adamw'}",
            f"{stage}.batch_size={batch_size}",
        )


FULL: tuple[Literal["full"], Literal["full"]] = ("full", "full")
STRATEGIES = (
    Strategy(name="full", roles=FULL, checkpointing=False, cost="nothing"),
    Strategy(name="full, checkpointing", roles=FULL, checkpointing=True, cost="blocks are computed twice"),
    Strategy(
        name="full, checkpointing, 8-bit Adam",
        roles=FULL,
        checkpointing=True,
        eight_bit=True,
        cost="coarser moments; needs bitsandbytes",
    ),
    Strategy(
        name="LoRA student, full fake, checkpointing",
        roles=("lora", "full"),
        checkpointing=True,
        cost="the student is an adapter on the teacher",
    ),
    Strategy(
        name="LoRA student, full fake, checkpointing, 8-bit Adam",
        roles=("lora", "full"),
        checkpointing=True,
        eight_bit=True,
        cost="an adapter; coarser moments; needs bitsandbytes",
    ),
    Strategy(
        name="LoRA both, checkpointing",
        roles=("lora", "lora"),
        checkpointing=True,
        cost="one frozen backbone for all roles; how well a LoRA fake score follows must be watched (fake_lag)",
    ),
)


class Row(BaseModel):
    """A strategy's prediction at one batch size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: Strategy
    batch_size: int | None  # the largest up to the recipe's that fits; None: none does
    fits: bool
    weight_bytes: int
    optimizer_bytes: int
    average_bytes: int
    working_bytes: int | None  # None: what stays is too much already
    step_flops: int | None

    @property
    def total_bytes(self) -> int:
        """What is needed at the least."""
        return self.weight_bytes + self.optimizer_bytes + self.average_bytes + (self.working_bytes or 0)


class Plan(BaseModel):
    """A stage on a GPU: every strategy, and the one to take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    gpu_bytes: int
    usable_bytes: int
    batch_size: int
    steps: int
    parameters: dict[str, int]
    rows: tuple[Row, ...]
    chosen: int | None
    reason: str

    @property
    def choice(self) -> Row | None:
        """The strategy to take."""
        return None if self.chosen is None else self.rows[self.chosen]


Predict = Callable[[Recipe, str, int], Prediction]


def usable(gpu_bytes: int) -> int:
    """Return what of a GPU's memory training can use."""
    return int((gpu_bytes - CONTEXT_BYTES) * (1 - FRAGMENTATION))


def plan(
    recipe: Recipe,
    stage: str,
    gpu_bytes: int,
    predict: Predict,
    strategies: Sequence[Strategy] = STRATEGIES,
) -> Plan:
    """Predict what suits the stage in order until one fits with the recipe's own batch; else take the first that fits.

    Memory grows in a straight line with the batch, so two predictions tell every size.

    Args:
        predict: (recipe, stage, budget of bytes) -> its prediction.
    """
    wanted, budget = recipe.stages[stage].batch_size, usable(gpu_bytes)
    rows: list[Row] = []
    known: dict[tuple[object, ...], tuple[Prediction, Prediction | None]] = {}
    parameters: dict[str, int] = {}
    for strategy in (one for one in strategies if one.suits(recipe.stages[stage])):
        key = (strategy.roles, strategy.checkpointing)
        if key not in known:
            small = predict(strategy.apply(recipe, stage, LEAST_BATCH), stage, budget)
            large = None
            if small.working_bytes is not None and wanted > LEAST_BATCH:
                large = predict(strategy.apply(recipe, stage, 2 * LEAST_BATCH), stage, budget)
            known[key] = small, large
        parameters = parameters or known[key][0].parameters
        rows.append(_row(strategy, *known[key], wanted, budget))
        if rows[-1].fits and rows[-1].batch_size == wanted:
            break
    chosen = next((i for i, row in enumerate(rows) if row.batch_size == wanted), None)
    if chosen is None:
        chosen = next((i for i, row in enumerate(rows) if row.fits), None)
    return Plan(
        stage=stage,
        gpu_bytes=gpu_bytes,
        usable_bytes=budget,
        batch_size=wanted,
        steps=recipe.stages[stage].steps,
        parameters=parameters,
        rows=tuple(rows),
        chosen=chosen,
        reason=_reason(rows, chosen, wanted, budget),
    )


def _row(strategy: Strategy, small: Prediction, large: Prediction | None, wanted: int, budget: int) -> Row:
    moments = sum(small.optimizer_bytes.values())
    if strategy.eight_bit:
        moments = moments // 4 + moments // 1024  # 1 byte for 4, and a float32 scale for every 256 values
    weights = sum(small.weight_bytes.values())
    fixed = weights + moments + small.average_bytes
    sizes = [size for size in (2**k for k in range(1, 20)) if size <= wanted]
    sizes = sorted({*sizes, wanted}, reverse=True)
    working: dict[int, tuple[int, int]] = {}
    if small.working_bytes is not None:
        for size in sizes:
            working[size] = _at(small, large, size)
    fitting = [size for size in working if fixed + working[size][0] <= budget]
    batch = fitting[0] if fitting else None
    shown = working.get(batch or LEAST_BATCH)
    return Row(
        strategy=strategy,
        batch_size=batch,
        fits=batch is not None,
        weight_bytes=weights,
        optimizer_bytes=moments,
        average_bytes=small.average_bytes,
        working_bytes=shown[0] if shown else None,
        step_flops=shown[1] if shown else None,
    )


def _at(small: Prediction, large: Prediction | None, size: int) -> tuple[int, int]:
    """Return working bytes and operations of a step at a batch size, on the line through two predictions."""
    assert small.working_bytes is not None
    if large is None or large.working_bytes is None or size == small.batch_size:
        return small.working_bytes, small.step_flops
    part = (size - small.batch_size) / (large.batch_size - small.batch_size)
    working = small.working_bytes + part * (large.working_bytes - small.working_bytes)
    return int(working), int(small.step_flops + part * (large.step_flops - small.step_flops))


def _reason(rows: Sequence[Row], chosen: int | None, wanted: int, budget: int) -> str:
    if chosen is None:
        least = min(rows, key=lambda row: row.total_bytes)
        size = f"at batch {LEAST_BATCH}" if least.working_bytes is not None else "before its first activation"
        return (
            f"nothing fits {budget / GIB:.1f} GiB: the smallest, {least.strategy.name}, needs "
            f"{least.total_bytes / GIB:.1f} GiB {size}; take a larger GPU, or a smaller shape"
        )
    row = rows[chosen]
    passed = [r.strategy.name for r in rows[:chosen]]
    less = f"{'; '.join(passed)} would not fit" if passed else "the first choice fits"
    if row.batch_size != wanted:
        return (
            f"{row.strategy.name}, with batch {row.batch_size} instead of {wanted}: no strategy fits the recipe's "
            f"batch in {budget / GIB:.1f} GiB. Cost: {row.strategy.cost}, and a noisier gradient"
        )
    return f"{row.strategy.name}: {less}. Cost: {row.strategy.cost}"


def hours(plan: Plan, utilisation: float = UTILISATION) -> dict[str, float]:
    """Estimate the chosen strategy's hours on one GPU of each known kind: operations over a share of the peak."""
    row = plan.choice
    if row is None or row.step_flops is None:
        return {}
    return {gpu.name: row.step_flops * plan.steps / (gpu.flops_16 * utilisation) / 3600 for gpu in GPUS}


def table(plan: Plan) -> str:
    """Return the plan as text."""
    sizes = ", ".join(f"{role} {count / 1e6:,.1f} M" for role, count in plan.parameters.items())
    title = f"{plan.stage}: {plan.gpu_bytes / GIB:.0f} GiB, of which {plan.usable_bytes / GIB:.1f} usable"
    columns = f"{'batch':>6}{'weights':>9}{'optimiser':>11}{'average':>9}{'working':>9}{'total':>9}  GiB"
    lines = [f"{title}; parameters: {sizes}", f"  {'strategy':<52}{columns}"]
    for index, row in enumerate(plan.rows):
        mark = "*" if index == plan.chosen else " "
        batch = str(row.batch_size) if row.fits else "no"
        working = "?" if row.working_bytes is None else f"{row.working_bytes / GIB:.2f}"
        more = ">" if row.working_bytes is None else ""
        total = f"{more}{row.total_bytes / GIB:.2f}"
        lines.append(
            f"{mark} {row.strategy.name:<52}{batch:>6}{row.weight_bytes / GIB:>9.2f}{row.optimizer_bytes / GIB:>11.2f}"
            f"{row.average_bytes / GIB:>9.2f}{working:>9}{total:>9}"
        )
    lines.append(f"  {plan.reason}")
    if row_ := plan.choice:
        assert row_.batch_size is not None
        lines.append(
            f"  {' '.join(f'--set {o}' for o in row_.strategy.overrides(plan.stage, row_.batch_size))}"
        )
        guess = ", ".join(f"{name} {_duration(value)}" for name, value in hours(plan).items())
        lines.append(
            f"  estimate, {plan.steps} steps on one GPU at {UTILISATION:.0%} of its bfloat16 peak: {guess}"
        )
    return "\n".join(lines)


def _duration(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def read_bytes(text: str) -> int:
    """Read a size like 24GiB, 80GB or 512MiB.

    Raises:
        ValueError: it is none.
    """
    units = {"GiB": GIB, "GB": 10**9, "MiB": 2**20, "MB": 10**6}
    for unit, size in units.items():
        if text.endswith(unit):
            try:
                value = float(text.removesuffix(unit))
            except ValueError:
                break
            if value > 0:
                return int(value * size)
    raise ValueError(f"--gpu: expected a memory size like 24GiB or 80GB, got {text!r}")
