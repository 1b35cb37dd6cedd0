"""Ways of training a stage that need ever less memory, in order of preference."""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..train.recipe import WITH_FAKE, AdversarialRecipe, Recipe

Kind = Literal["full", "lora"]
Roles = tuple[Kind, Kind]  # student, fake score

NO_COST = "nothing"
FULL: Roles = ("full", "full")
NAMES: dict[Roles, str] = {
    FULL: "full",
    ("full", "lora"): "full student, LoRA fake",
    ("lora", "full"): "LoRA student, full fake",
    ("lora", "lora"): "LoRA both",
}
# What roles cost that are not the recipe's own; in this order they are turned to.
COSTS: dict[Roles, str] = {
    ("lora", "full"): "the student is an adapter on the teacher",
    ("lora", "lora"): (
        "one frozen backbone for all roles; how well a LoRA fake score follows must be watched (fake_lag)"
    ),
}
# An adapter hardly moves at a whole network's rate: DMD2's for SDXL has a hundred times that.
LORA_RATE = 5e-5
LORA_RATE_FROM = (
    "rates of what becomes an adapter: [fallback] DMD2's LoRA student; [guess] the same for the fake score"
)


class Strategy(BaseModel):
    """Changes of a recipe that need less memory, and what they cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    roles: Roles
    checkpointing: bool
    eight_bit: bool = False
    sharding: Literal["none", "fsdp"] = "none"
    cost: str

    @property
    def learns(self) -> tuple[object, ...]:
        """What decides what is learnt: strategies that differ in nothing of it end at the same student."""
        return self.roles, self.eight_bit

    def shared_out(self) -> "Strategy":
        """Return it with networks shared out over several GPUs."""
        name = f"{self.name}, shared out"
        cost = "blocks travel between the GPUs at every use"
        cost = cost if self.cost == NO_COST else f"{self.cost}; {cost}"
        return self.model_copy(update={"name": name, "sharding": "fsdp", "cost": cost})

    def apply(self, recipe: Recipe, stage: str, rows: int, at_once: int | None = None) -> Recipe:
        """Return the recipe with this strategy, for one GPU's rows of the batch.

        Adam is the one in 32 bits: 8 bits are not run on the meta device.

        Args:
            at_once: rows that are computed at once; None: all.
        """
        section = recipe.stages[stage].model_copy(update={"batch_size": rows})
        if hasattr(section, "pixel_batch"):
            section = section.model_copy(update={"pixel_batch": min(section.pixel_batch, rows)})
        roles = recipe.roles.model_copy(update={"student": self.roles[0], "fake": self.roles[1]})
        changes = {
            "checkpointing": self.checkpointing,
            "sharding": self.sharding,
            "micro_batch": at_once,
            "optimizer": "adamw",
        }
        memory = recipe.memory.model_copy(update=changes)
        return recipe.model_copy(update={stage: section, "roles": roles, "memory": memory})

    def suits(self, recipe: Recipe) -> bool:
        """Tell whether a recipe's stages can be trained so.

        IDA mixes weights of student and fake score, of one kind then; whole weights to start from are no adapter's,
        and no more is a code of the noise.
        """
        mixes = any(getattr(section, "ida", 0) for section in recipe.stages.values())
        may_adapt = recipe.start is None and recipe.variety is None
        return (self.roles[0] == "full" or may_adapt) and (self.roles[0] == self.roles[1] or not mixes)

    def overrides(self, recipe: Recipe, at_once: int | None) -> tuple[str, ...]:
        """Return what to pass to `--set` for it; roles are the whole run's, and so are the rates beside them."""
        return (
            f"roles.student={self.roles[0]}",
            f"roles.fake={self.roles[1]}",
            *self.rates(recipe),
            f"memory.checkpointing={str(self.checkpointing).lower()}",
            f"memory.optimizer={'adamw8bit' if self.eight_bit else 'adamw'}",
            f"memory.sharding={self.sharding}",
            f"memory.micro_batch={at_once or 'null'}",
        )

    def rates(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the rates, for `--set`, of what is whole in the recipe and an adapter here: not below LORA_RATE."""
        own = (recipe.roles.student, recipe.roles.fake)
        student, fake = (now != before for now, before in zip(self.roles, own, strict=True))
        rates: dict[str, float] = {}
        for name, section in recipe.stages.items():
            if isinstance(section, AdversarialRecipe):
                if student:
                    rates[f"{name}.rates.student"] = section.rates.student
                if fake and name in WITH_FAKE:
                    rates[f"{name}.rates.fake"] = section.rates.fake
            elif student:
                rates[f"{name}.rate"] = getattr(section, "rate")  # noqa: B009
        return tuple(f"{key}={LORA_RATE:g}" for key, rate in rates.items() if rate < LORA_RATE)


def strategies_for(gpus: int, own: Roles = FULL) -> tuple[Strategy, ...]:
    """Return what may be tried on so many GPUs, in order of preference; 8-bit moments cannot be shared out.

    The recipe's own roles come first; after them those with more adapters, which need less memory.
    """
    fewer = [roles for roles in COSTS if roles != own and _keeps_adapters(own, roles)]
    made = [Strategy(name=NAMES[own], roles=own, checkpointing=False, cost=NO_COST)]
    for roles in (own, *fewer):
        made += _recomputing(roles, "" if roles == own else COSTS[roles])
    if gpus == 1:
        return tuple(made)
    both = [(s,) if s.eight_bit else (s, s.shared_out()) for s in made]
    return tuple(strategy for each in both for strategy in each)


def _keeps_adapters(own: Roles, roles: Roles) -> bool:
    """Tell whether no adapter of `own` is a whole network in `roles`."""
    return all(now == "lora" for now, before in zip(roles, own, strict=True) if before == "lora")


def _recomputing(roles: Roles, changed: str) -> Iterator[Strategy]:
    """Yield roles with recomputed blocks, and 8-bit moments where those of a whole network are large."""
    name = f"{NAMES[roles]}, checkpointing"
    yield Strategy(name=name, roles=roles, checkpointing=True, cost=changed or "blocks are computed twice")
    if "full" in roles:
        coarser = "coarser moments; needs bitsandbytes"
        cost = f"{changed}; {coarser}" if changed else coarser
        name = f"{name}, 8-bit Adam"
        yield Strategy(name=name, roles=roles, checkpointing=True, eight_bit=True, cost=cost)
