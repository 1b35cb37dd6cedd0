"""Several processes that train together: who computes which rows, and how they agree.

A row's random draws depend on (seed, step, row, purpose) and not on who computes it, so two processes see the draws of
one. Gradients are averaged over equal shares, which is the gradient of the whole batch's mean; the sum's order differs
with the number of processes, and so do last bits.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UsageError

T = TypeVar("T")
PATIENCE = timedelta(hours=24)  # others wait this long for the first one's evaluation and export


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place (`index` from 0) among `count` that train together."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Tell whether this process writes files and reports."""
        return self.index == 0

    def rows(self, batch_size: int) -> range:
        """Return this process's rows of a batch: every count-th, so that the first k rows of a batch are shared too.

        Raises:
            ValueError: the batch cannot be shared equally.
        """
        if batch_size % self.count:
            raise ValueError(
                f"expected a batch size that {self.count} processes can share equally, got {batch_size}"
            )
        return range(self.index, batch_size, self.count)

    def dealt(self, count: int) -> list[int]:
        """Return this process's turns at `count` things: as many as every other's, so some may come up twice."""
        rounds = -(-count // self.count)
        return [(turn * self.count + self.index) % count for turn in range(rounds)]

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their mean over all processes, in place."""
        if self.count == 1 or not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        means = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.count == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool, device: torch.device | None = None) -> bool:
        """Tell whether the flag is raised in any process: all get the same answer at the same point."""
        if self.count == 1:
            return flag
        raised = torch.tensor([float(flag)], device=device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process work while the others wait; all get its result, or its error.

        Raises:
            ValueError: the work raised, in the first process: in the others with the same words.
        """
        if self.count == 1:
            return work()
        done: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                done[0] = work()
            except Exception as error:  # noqa: BLE001
                # Handed on to all, and raised below.
                failure, done[1] = error, f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(done)
        if failure is not None:
            raise failure
        if done[1] is not None:
            raise ValueError(f"the first process failed: {done[1]}")
        return done[0]  # type: ignore[no-any-return]

    def agree(self, value: T) -> T:
        """Return the first process's value, in all of them."""
        return self.first(lambda: value)


ALONE = Ranks()


@contextmanager
def joined(device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Be one of the processes that torchrun started; alone where it did not.

    Raises:
        ValueError: the environment of torchrun is incomplete.
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in environment]
    if missing:
        raise ValueError(f"expected torchrun's environment, found WORLD_SIZE without {', '.join(missing)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what is gathered over processes lies there too
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
        dist.barrier()  # one that leaves early would break the others' connections
    finally:
        dist.destroy_process_group()


def own_device(name: str, environment: Mapping[str, str] = os.environ) -> torch.device:
    """Return the device that this process computes on: "auto" takes a GPU where there is one, each process its own.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not name.startswith("cuda"):
        raise UsageError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: expected a CUDA device, this torch finds none; use --device cpu")
    number = name.partition(":")[2] or environment.get("LOCAL_RANK", "0")
    if not number.isdigit() or int(number) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: expected a number below {torch.cuda.device_count()}, got {number!r}"
        )
    return torch.device("cuda", int(number))
