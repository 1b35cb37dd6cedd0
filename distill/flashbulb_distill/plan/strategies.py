"""Ways of training a stage that need ever less memory, in order of preference."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..train.recipe import Recipe


class Strategy(BaseModel):
    """Changes of a recipe that need less memory, and what they cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    roles: tuple[Literal["full", "lora"], Literal["full", "lora"]]  # student, fake score
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

    def suits(self, recipe: Recipe, stage: str) -> bool:
        """Tell whether a stage can be trained so.

        IDA mixes weights of student and fake score, of one kind then; whole weights to start from are no adapter's.
        """
        mixes = bool(getattr(recipe.stages[stage], "ida", 0))
        starts_whole = self.roles[0] == "full" or recipe.start is None
        return starts_whole and (self.roles[0] == self.roles[1] or not mixes)

    def overrides(self, at_once: int | None) -> tuple[str, ...]:
        """Return what to pass to `--set` for it."""
        return (
            f"roles.student={self.roles[0]}",
            f"roles.fake={self.roles[1]}",
            f"memory.checkpointing={str(self.checkpointing).lower()}",
            f"memory.optimizer={'adamw8bit' if self.eight_bit else 'adamw'}",
            f"memory.sharding={self.sharding}",
            f"memory.micro_batch={at_once or 'null'}",
        )


NO_COST = "nothing"
FULL: tuple[Literal["full"], Literal["full"]] = ("full", "full")
STRATEGIES = (
    Strategy(name="full", roles=FULL, checkpointing=False, cost=NO_COST),
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


def strategies_for(gpus: int) -> tuple[Strategy, ...]:
    """Return what may be tried on so many GPUs, in order of preference; 8-bit moments cannot be shared out."""
    if gpus == 1:
        return STRATEGIES
    both = [(s,) if s.eight_bit else (s, s.shared_out()) for s in STRATEGIES]
    return tuple(strategy for each in both for strategy in each)
