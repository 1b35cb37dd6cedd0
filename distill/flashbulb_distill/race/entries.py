"""Who runs: each entry is a chain of stages that share the student's updates equally."""

from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError

Stage = Literal["regression", "adp", "adm", "dmd", "dmd2", "ladd", "lcm"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One runner: a short name, what it is, and its stages in order.

    carry_heads: ADM starts from the latent heads of the stage before instead of new ones.
    """

    name: str
    title: str
    stages: tuple[Stage, ...]
    carry_heads: bool = False


# A and B as in Table 4 of arXiv 2507.18569, which does not say where ADM's heads start after ADP: B4 and B4h. Then the
# methods that one would use instead.
ENTRIES = (
    Entry("A1", "regression on the pairs", ("regression",)),
    Entry("A5", "ADP alone", ("adp",)),
    Entry("B1", "ADM without ADP", ("adm",)),
    Entry("B2", "DMD without ADP", ("dmd",)),
    Entry("B3", "DMD after ADP", ("adp", "dmd")),
    Entry("B4", "DMDX: ADM after ADP", ("adp", "adm")),
    Entry("B4h", "the same with ADP's heads", ("adp", "adm"), carry_heads=True),
    Entry("DMD2", "DMD with a GAN term", ("dmd2",)),
    Entry("LADD", "latent adversarial distillation", ("ladd",)),
    Entry("LCM", "latent consistency", ("lcm",)),
)


def find_entries(names: str | None) -> tuple[Entry, ...]:
    """Return the entries of a comma-separated list of names; all of them without one.

    Raises:
        UsageError: no entry has such a name.
    """
    if names is None:
        return ENTRIES
    known = {entry.name.lower(): entry for entry in ENTRIES}
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        listed = ", ".join(entry.name for entry in ENTRIES)
        raise UsageError(f"--methods: expected some of {listed}, got {names!r}")
    return tuple(known[name] for name in dict.fromkeys(wanted))
