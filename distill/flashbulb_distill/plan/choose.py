"""Which way of training a stage fits a GPU, and why: strategies in order of preference, each predicted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from pydantic import BaseModel, ConfigDict

from ..errors import UsageError
from ..train.checkpoint import KEPT
from ..train.recipe import Recipe
from .predict import Prediction
from .strategies import NO_COST, Roles, Strategy, strategies_for

GIB = 2**30
CONTEXT_BYTES = 6 * GIB // 10  # what CUDA and its libraries take; an assumption
FRAGMENTATION = 0.05  # of the memory that the allocator cannot use; an assumption
LEAST_ROWS = 2  # that are computed at once: fewer leave a GPU idle


class Row(BaseModel):
    """A strategy's prediction for one GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: Strategy
    rows: int | None  # the most, up to a GPU's share of the batch, that fit at once; None: none do
    weight_bytes: int
    optimizer_bytes: int
    average_bytes: int
    checkpoint_bytes: int  # on the disk
    working_bytes: int | None  # None: what stays is too much already
    step_flops: int | None

    @property
    def fits(self) -> bool:
        """Tell whether it fits at all."""
        return self.rows is not None

    @property
    def total_bytes(self) -> int:
        """What is needed at the least."""
        return self.weight_bytes + self.optimizer_bytes + self.average_bytes + (self.working_bytes or 0)


class Plan(BaseModel):
    """A stage on one GPU of several: every strategy, and the one to take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    gpus: int
    gpu_bytes: int
    usable_bytes: int
    batch_size: int
    steps: int
    save_every: int  # steps from checkpoint to checkpoint
    look_every: (
        int | None
    )  # steps from look to look of the guard, which keeps one too; None: there is no guard
    written: int  # checkpoints in all, if the guard finds the student well and never goes back
    kept: int  # checkpoints that are there at a time, while another one is written
    parameters: dict[str, int]
    rows: tuple[Row, ...]
    chosen: int | None
    reason: str
    overrides: tuple[str, ...] = ()  # what to pass to `--set`
    rates: tuple[str, ...] = ()  # those of them that are rates of what becomes an adapter

    @property
    def share(self) -> int:
        """How many of the batch's rows one GPU computes."""
        return self.batch_size // self.gpus

    @property
    def choice(self) -> Row | None:
        """The strategy to take."""
        return None if self.chosen is None else self.rows[self.chosen]


Predict = Callable[[Recipe, str, int], Prediction]


def usable(gpu_bytes: int) -> int:
    """Return what of a GPU's memory training can use."""
    return int((gpu_bytes - CONTEXT_BYTES) * (1 - FRAGMENTATION))


@dataclass(frozen=True, slots=True)
class Line:
    """Working bytes and operations of a step, for any number of rows: straight lines through a few predictions.

    Args:
        small: of `least` rows at once.   large: of twice as many; None where nothing more is asked.
        parts, more: of twice and of three times as many, `least` at once; None where all fit at once.
        shown: how many of the rows the pixel discriminator sees, and `unshown`: `small` where it sees one row less;
            None where it sees them all, or there is none.
    """

    small: Prediction
    large: Prediction | None = None
    parts: Prediction | None = None
    more: Prediction | None = None
    shown: int = 0
    unshown: Prediction | None = None

    def at(self, rows: int, at_once: int) -> tuple[int, int]:
        """Return working bytes and operations of `rows` rows that are computed `at_once` at a time."""
        least = self.small.batch_size
        working, flops = _bytes(self.small), self.small.step_flops
        if self.large is None:
            return working, flops
        row_bytes = (_bytes(self.large) - working) / least
        row_flops = (self.large.step_flops - flops) / least
        whole = working + (at_once - least) * row_bytes, flops + (rows - least) * row_flops
        if self.unshown is not None:
            a_look = working - _bytes(self.unshown), flops - self.unshown.step_flops
            whole = (
                whole[0] - max(0, at_once - self.shown) * a_look[0],
                whole[1] - max(0, rows - self.shown) * a_look[1],
            )
        if rows == at_once or self.parts is None or self.more is None:
            return int(whole[0]), int(whole[1])
        # In parts each row is kept as it was sampled, gradients wait, and the student is sampled once more.
        kept = max(0.0, (_bytes(self.more) - _bytes(self.parts)) / least)
        waiting = max(0.0, _bytes(self.parts) - working - least * kept)
        again = self.parts.step_flops / self.large.step_flops
        return int(whole[0] + waiting + (rows - at_once) * kept), int(whole[1] * again)


def _bytes(prediction: Prediction) -> int:
    assert prediction.working_bytes is not None  # it ran
    return prediction.working_bytes


def plan_stages(
    recipe: Recipe, stages: Sequence[str], gpu_bytes: int, predict: Predict, *, gpus: int = 1
) -> list[Plan]:
    """Plan stages of one run: each as `plan` does, but all with the roles of the one that needs the most adapters.

    Raises:
        ValueError: the GPUs cannot share a batch equally.
    """
    known = cache(predict)
    alone = [plan(recipe, stage, gpu_bytes, known, gpus=gpus) for stage in stages]
    chosen = {made.choice.strategy.roles for made in alone if made.choice is not None}
    if len(chosen) < 2:
        return alone
    last = max(chosen, key=_order(strategies_for(gpus, _roles(recipe))).index)
    return [plan(recipe, stage, gpu_bytes, known, gpus=gpus, roles=last) for stage in stages]


def _roles(recipe: Recipe) -> Roles:
    return recipe.roles.student, recipe.roles.fake


def _order(strategies: Sequence[Strategy]) -> list[Roles]:
    """Return the roles of strategies as they are turned to."""
    return list(dict.fromkeys(strategy.roles for strategy in strategies))


def plan(
    recipe: Recipe,
    stage: str,
    gpu_bytes: int,
    predict: Predict,
    strategies: Sequence[Strategy] | None = None,
    *,
    gpus: int = 1,
    roles: Roles | None = None,
) -> Plan:
    """Predict what suits the recipe in order until one fits, and choose.

    What learns the same as the first that fits is compared, however few rows fit at once: taken is what computes a
    GPU's rows all at once, else what computes the most.

    Args:
        predict: (recipe, stage, budget of bytes) -> its prediction.
        roles: what is chosen has these; None: those of the first that fits.
    Raises:
        ValueError: the GPUs cannot share the batch equally.
    """
    wanted, budget = recipe.stages[stage].batch_size, usable(gpu_bytes)
    recipe = _one_of(recipe, stage, gpus)
    share, rows = wanted // gpus, list[Row]()
    known: dict[tuple[object, ...], Line] = {}
    parameters: dict[str, int] = {}
    tried = strategies_for(gpus, _roles(recipe)) if strategies is None else strategies
    if roles is not None:
        order = _order(tried)
        tried = [one for one in tried if order.index(one.roles) <= order.index(roles)]
    for strategy in (one for one in tried if one.suits(recipe)):
        if (best := _best(rows, share, roles)) is not None and (
            rows[best].rows == share or strategy.learns != rows[best].strategy.learns
        ):
            break
        key = (strategy.roles, strategy.checkpointing, strategy.sharding)
        if key not in known:
            known[key] = _line(strategy, recipe, stage, share, budget, predict)
        parameters = parameters or known[key].small.parameters
        rows.append(_row(strategy, known[key], share, budget))
    chosen = _best(rows, share, roles)
    choice = None if chosen is None else rows[chosen]
    at_once = choice.rows if choice and choice.rows != share else None
    return Plan(
        stage=stage,
        gpus=gpus,
        gpu_bytes=gpu_bytes,
        usable_bytes=budget,
        batch_size=wanted,
        steps=recipe.stages[stage].steps,
        save_every=recipe.checkpoint_every,
        look_every=None if recipe.guard is None else recipe.guard.every,
        written=_written(recipe, recipe.stages[stage].steps),
        kept=KEPT + 1 + (recipe.guard is not None),
        parameters=parameters,
        rows=tuple(rows),
        chosen=chosen,
        reason=_reason(rows, chosen, share, budget),
        overrides=choice.strategy.overrides(recipe, at_once) if choice else (),
        rates=choice.strategy.rates(recipe) if choice else (),
    )


def _written(recipe: Recipe, steps: int) -> int:
    """Return at how many steps the trainer writes a checkpoint."""
    at = {steps, *range(recipe.checkpoint_every, steps, recipe.checkpoint_every)}
    if recipe.guard is not None:
        at |= {0, *range(recipe.guard.every, steps, recipe.guard.every)}  # 0: a place to go back to
    return len(at)


def _one_of(recipe: Recipe, stage: str, gpus: int) -> Recipe:
    """Return the recipe with one GPU's rows of the batch, and of those that the pixel discriminator sees."""
    changes = dict[str, int]()
    for name, rows in recipe.stages[stage].batches.items():
        if rows % gpus:
            raise UsageError(f"--gpus: expected a number that shares {stage}.{name}, {rows}, got {gpus}")
        changes[name] = rows // gpus
    return _with(recipe, stage, **changes)


def _best(rows: Sequence[Row], share: int, roles: Roles | None) -> int | None:
    """Return the place of the row to take; None gives any roles."""
    fit = [i for i, row in enumerate(rows) if row.fits and roles in (None, row.strategy.roles)]
    if not fit:
        return None
    same = [i for i in fit if rows[i].strategy.learns == rows[fit[0]].strategy.learns]
    return max(same, key=lambda i: (rows[i].rows or 0, -i))


def _line(strategy: Strategy, recipe: Recipe, stage: str, share: int, budget: int, predict: Predict) -> Line:
    """Predict as much of a strategy as the choice needs."""
    least = min(LEAST_ROWS, share)
    shown = getattr(recipe.stages[stage], "pixel_batch", share)
    if least < share and shown < share:  # a straight line is of rows that are all shown
        recipe = _with(recipe, stage, pixel_batch=share)
    small = predict(strategy.apply(recipe, stage, least), stage, budget)
    if small.working_bytes is None or share == least:
        return Line(small)
    line = Line(small, predict(strategy.apply(recipe, stage, 2 * least), stage, budget))
    if shown < share:
        fewer = strategy.apply(_with(recipe, stage, pixel_batch=least - 1), stage, least)
        line = replace(line, shown=shown, unshown=predict(fewer, stage, budget))
    if _fixed(strategy, small) + line.at(share, share)[0] <= budget:
        return line
    parts, more = (
        predict(strategy.apply(recipe, stage, k * least, at_once=least), stage, budget) for k in (2, 3)
    )
    return replace(line, parts=parts, more=more)


def _with(recipe: Recipe, stage: str, **changes: int) -> Recipe:
    return recipe.model_copy(update={stage: recipe.stages[stage].model_copy(update=changes)})


def _moments(strategy: Strategy, prediction: Prediction) -> int:
    moments = sum(prediction.optimizer_bytes.values())
    if strategy.eight_bit:
        return moments // 4 + moments // 1024  # 1 byte for 4, and a float32 scale for every 256 values
    return moments


def _fixed(strategy: Strategy, prediction: Prediction) -> int:
    """Return the bytes that stay from step to step."""
    weights = sum(prediction.weight_bytes.values())
    return weights + _moments(strategy, prediction) + prediction.average_bytes


def _row(strategy: Strategy, line: Line, share: int, budget: int) -> Row:
    small, fixed = line.small, _fixed(strategy, line.small)
    least = small.batch_size
    sizes = sorted(
        {size for size in (2**k for k in range(20)) if least <= size < share} | {share}, reverse=True
    )
    needed = {size: line.at(share, size) for size in sizes} if small.working_bytes is not None else {}
    rows = next((size for size, (working, _) in needed.items() if fixed + working <= budget), None)
    shown = needed.get(rows or least)
    return Row(
        strategy=strategy,
        rows=rows,
        weight_bytes=sum(small.weight_bytes.values()),
        optimizer_bytes=_moments(strategy, small),
        average_bytes=small.average_bytes,
        checkpoint_bytes=small.checkpoint_bytes
        - sum(small.optimizer_bytes.values())
        + _moments(strategy, small),
        working_bytes=shown[0] if shown else None,
        step_flops=shown[1] if shown else None,
    )


def _reason(rows: Sequence[Row], chosen: int | None, share: int, budget: int) -> str:
    if chosen is None:
        least = min(rows, key=lambda row: row.total_bytes)
        size = f"for {LEAST_ROWS} rows" if least.working_bytes is not None else "before its first activation"
        return (
            f"nothing fits {budget / GIB:.1f} GiB: the smallest, {least.strategy.name}, needs "
            f"{least.total_bytes / GIB:.1f} GiB {size}; take a larger GPU, more of them, or a smaller shape"
        )
    row = rows[chosen]
    passed = [r.strategy.name for r in rows[:chosen] if not r.fits]
    others = [r.strategy.name for r in rows[:chosen] if r.fits and r.strategy.roles != row.strategy.roles]
    told = [f"{'; '.join(passed)} would not fit"] if passed else []
    told += [f"{'; '.join(others)} would fit this stage alone"] if others else []
    less = ", ".join(told) or "the first choice fits"
    if row.rows != share:
        again = "" if row.strategy.cost == NO_COST else f"{row.strategy.cost}; "
        return (
            f"{row.strategy.name}, {row.rows} of {share} rows at once: {less}. "
            f"Cost: {again}samples are drawn twice; the gradient is the whole batch's"
        )
    return f"{row.strategy.name}: {less}. Cost: {row.strategy.cost}"
