"""Write docs/plans.md from benchmarks/results/plans.json: no number is typed in. Called by docs/reference.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "plans.json"
GIB = 2**30
HEAD = """\
# What fits which GPU

What `flashbulb distill plan` says of the recipes as they are. **These are predictions; none was confirmed on a GPU.**
Memory is that of the recipe's own training step on the meta device, with `memory.micro_batch`, checkpointing,
adapters and, on several GPUs, shared-out networks (`fsdp`) where they are needed. Hours are the step's operations
over 35 % of the GPU's bfloat16 peak, without communication between GPUs, of training alone: pairs, evaluation and
export come on top.

What was compared: [steps of small networks on a CPU](distilling.md#plan-what-a-gpu-can-hold), within 3 % of the
measured peak; but of CogVideoX 9 % too low in float32, and 32 % too low in bfloat16, in which its recipes compute:
leave room. Two processes on a CPU that share out the emoji teacher's networks, whose working memory is predicted up
to 11 % too high. No `fsdp` plan below was compared with a measured run.

A plan takes the first strategy that fits, the recipe's own roles first, and all stages of a run have the same. If need
be it computes fewer rows at once, which changes nothing of what is learnt. A role that becomes an adapter asks for an
adapter's rate: the printed options have it. Every GPU has the same share of the batch.
`flashbulb distill plan RECIPE --gpu SIZE --gpus N` prints every strategy and the `--set` options to copy."""


def plans_page(path: Path = RESULT) -> str:
    """Return the page: a section for each recipe, a row for each training stage and GPU."""
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = [HEAD]
    for name, recipe in result["recipes"].items():
        lines += ["", f"## {name}", "", f"Teacher `{recipe['teacher']}`."]
        for stage, rows in recipe["stages"].items():
            first = next(row for by_count in rows.values() for row in by_count.values())
            lines += [
                "",
                f"`{stage}`, {first['steps']:,} steps, batch {first['batch']}:",
                "",
                "| GPUs | GiB of each | strategy | rows at once | needs, GiB | hours |",
                "|---|---|---|---|---|---|",
                *(
                    _row(f"{count} × {gpu}", size, row)
                    for gpu, size in result["gpus"].items()
                    for count, row in rows[gpu].items()
                ),
            ]
    commits = sorted({recipe["commit"] for recipe in result["recipes"].values()})
    lines += ["", f"`python -m benchmarks plans --write`, commit {', '.join(f'`{c}`' for c in commits)}."]
    return "\n".join(lines) + "\n"


def _row(gpu: str, size: int, row: Mapping[str, Any]) -> str:
    if not row["fits"]:
        return f"| {gpu} | {size / GIB:.0f} | none: {row['reason']} | | | |"
    cells = (
        row["strategy"],
        f"{row['rows_at_once']} of {row['rows']}",
        f"{row['gib']:.1f}",
        _hours(row["hours"]),
    )
    return f"| {gpu} | {size / GIB:.0f} | {' | '.join(map(str, cells))} |"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"
