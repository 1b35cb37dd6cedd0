"""Memory and time of the large recipes on one GPU and on several, as `flashbulb distill plan` predicts them.

    python -m benchmarks plans [--recipe NAME ...] [--write]

Nothing is measured here and no GPU is needed: each recipe's own training steps run on the meta device, once for a
strategy and a number of rows, and every GPU is judged by these. `--recipe` does some recipes again and keeps what is
written of the others; `docs/plans.md` is made from the file. The demo's recipes are left out: they fit anywhere, and at
their size a GPU's time is that of launching kernels, which operations do not tell.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rig

from flashbulb_distill.plan.choose import GIB, Plan, plan_stages
from flashbulb_distill.plan.predict import Prediction, predict
from flashbulb_distill.plan.text import hours
from flashbulb_distill.train.recipe import Recipe, load_recipe

NAME = "plans"
RECIPES = rig.ROOT / "distill" / "recipes"
# What is asked of each stage: a GPU of `flashbulb_kernels.gpus` and the memory that it is sold with.
GPUS: Mapping[str, int] = {
    "RTX 4090": 24 * GIB,
    "RTX 5090": 32 * GIB,
    "H100 SXM": 80 * GIB,
    "B200": 180 * 10**9,
}
COUNTS = (1, 8)  # GPUs that train together
Predict = Callable[[Recipe, str, int, int], Prediction]  # recipe, stage, budget, GPUs


def main(argv: Sequence[str] | None = None) -> int:
    parser = rig.plain_arguments(__doc__)
    loaded = large()
    names = list(loaded)
    parser.add_argument("--recipe", nargs="+", choices=names, help="only these again")
    args = parser.parse_args(argv)
    made = {}
    for name in args.recipe or names:
        started = time.monotonic()
        made[name] = plan_recipe(loaded[name], _predict)
        rig.say(f"plans: {name}, {time.monotonic() - started:.0f} s")
    before = rig.RESULTS / f"{NAME}.json"
    kept = json.loads(before.read_text())["recipes"] if args.recipe and before.exists() else {}
    recipes = {name: (kept | made)[name] for name in names if name in kept | made}
    rig.finish(NAME, {"gpus": dict(GPUS), "recipes": recipes}, write=args.write)
    return 0


def large() -> dict[str, Recipe]:
    """Return the recipes that are planned, by name."""
    loaded = {path.stem: load_recipe(path, ()) for path in sorted(RECIPES.glob("*.yaml"))}
    return {name: recipe for name, recipe in loaded.items() if not recipe.is_demo}


def plan_recipe(recipe: Recipe, predict: Predict) -> dict[str, Any]:
    """Plan every stage of a recipe on every GPU, the largest first: what runs there need not run for smaller ones."""
    known: dict[str, Prediction] = {}

    def on(gpus: int) -> Callable[[Recipe, str, int], Prediction]:
        def once(changed: Recipe, stage: str, budget: int) -> Prediction:
            together = gpus if changed.memory.sharding == "fsdp" else 1
            key = f"{changed.stages[stage]!r} {changed.roles} {changed.memory} {together}"
            if key not in known:
                known[key] = predict(changed, stage, budget, together)
            return known[key]

        return once

    told: dict[str, dict[str, dict[str, Any]]] = {stage: {} for stage in recipe.stages}
    for gpu in sorted(GPUS, key=lambda gpu: -GPUS[gpu]):
        for n in COUNTS:
            for made in plan_stages(recipe, list(recipe.stages), GPUS[gpu], on(n), gpus=n):
                told[made.stage].setdefault(gpu, {})[str(n)] = _row(made, gpu)
    return {
        "sha256": recipe.sha256(),
        "commit": rig.COMMIT,
        "teacher": recipe.teacher,
        "stages": told,
    }


def _predict(recipe: Recipe, stage: str, budget: int, gpus: int) -> Prediction:
    started = time.monotonic()
    made = predict(recipe, stage, budget, gpus=gpus)
    kinds, memory, rows = recipe.roles, recipe.memory, recipe.stages[stage].batch_size
    rig.say(
        f"  {stage}: student {kinds.student}, fake {kinds.fake}, checkpointing {memory.checkpointing}, sharding "
        f"{memory.sharding}, {rows} rows, {memory.micro_batch or 'all'} at once: {time.monotonic() - started:.0f} s"
    )
    return made


def _row(made: Plan, gpu: str) -> dict[str, Any]:
    row = made.choice
    told: dict[str, Any] = {"steps": made.steps, "batch": made.batch_size, "reason": made.reason}
    if row is None:
        return told | {"fits": False}
    return told | {
        "fits": True,
        "strategy": row.strategy.name,
        "rows": made.share,
        "rows_at_once": row.rows,
        "gib": round(row.total_bytes / GIB, 2),
        "hours": hours(made)[gpu],
    }


if __name__ == "__main__":
    sys.exit(main())
