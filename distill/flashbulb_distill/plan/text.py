"""A plan as text, with the hours that it guesses; sizes of memory as they are typed."""

from flashbulb_kernels.gpus import GPUS

from ..errors import UsageError
from .choose import GIB, Plan
from .strategies import LORA_RATE_FROM

UTILISATION = 0.35  # of a GPU's peak that training reaches; an assumption
UNMEASURED = (
    "not measured on several GPUs: shared-out memory is arithmetic (a part of each block, two blocks gathered), held "
    "against two small processes on a CPU; the time has no communication in it; each GPU holds one network whole "
    "while that is loaded"
)


def hours(plan: Plan, utilisation: float = UTILISATION) -> dict[str, float]:
    """Estimate the chosen strategy's hours on GPUs of each known kind: one's operations over a share of its peak."""
    row = plan.choice
    if row is None or row.step_flops is None:
        return {}
    return {gpu.name: row.step_flops * plan.steps / (gpu.flops_16 * utilisation) / 3600 for gpu in GPUS}


def table(plan: Plan) -> str:
    """Return the plan as text."""
    sizes = ", ".join(f"{role} {count / 1e6:,.1f} M" for role, count in plan.parameters.items())
    several = f"{plan.gpus} GPUs of {plan.gpu_bytes / GIB:.0f} GiB each" if plan.gpus > 1 else ""
    where = several or f"{plan.gpu_bytes / GIB:.0f} GiB"
    title = f"{plan.stage}: {where}, of which {plan.usable_bytes / GIB:.1f} usable"
    columns = f"{'rows':>6}{'weights':>9}{'optimiser':>11}{'average':>9}{'working':>9}{'total':>9}  GiB"
    lines = [f"{title}; parameters: {sizes}", f"  {'strategy':<64}{columns}"]
    for index, row in enumerate(plan.rows):
        mark = "*" if index == plan.chosen else " "
        rows = str(row.rows) if row.fits else "no"
        working = "?" if row.working_bytes is None else f"{row.working_bytes / GIB:.2f}"
        more = ">" if row.working_bytes is None else ""
        total = f"{more}{row.total_bytes / GIB:.2f}"
        lines.append(
            f"{mark} {row.strategy.name:<64}{rows:>6}{row.weight_bytes / GIB:>9.2f}{row.optimizer_bytes / GIB:>11.2f}"
            f"{row.average_bytes / GIB:>9.2f}{working:>9}{total:>9}"
        )
    lines.append(f"  {plan.reason}")
    if plan.choice:
        lines.append(f"  {' '.join(f'--set {o}' for o in plan.overrides)}")
        lines += [f"  {LORA_RATE_FROM}"] if plan.rates else []
        disk = plan.choice.checkpoint_bytes / GIB
        looks = f" and every {plan.look_every} (guard.every)" if plan.look_every else ""
        lines.append(
            f"  disk: a checkpoint of {disk:,.1f} GiB every {plan.save_every} steps (save_every){looks}, "
            f"up to {plan.kept} at a time, {plan.kept * disk:,.1f} GiB; {plan.written * disk:,.0f} GiB written in all"
        )
        guess = ", ".join(f"{name} {_duration(value)}" for name, value in hours(plan).items())
        count = "one GPU" if plan.gpus == 1 else f"{plan.gpus} GPUs"
        lines.append(
            f"  estimate, {plan.steps} steps on {count} at {UTILISATION:.0%} of the bfloat16 peak: {guess}"
        )
    if plan.gpus > 1:
        lines.append(f"  {UNMEASURED}")
    return "\n".join(lines)


def _duration(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def read_bytes(text: str) -> int:
    """Read a size like 24GiB, 80GB or 512MiB.

    Raises:
        UsageError: it is none.
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
    raise UsageError(f"--gpu: expected a memory size like 24GiB or 80GB, got {text!r}")
