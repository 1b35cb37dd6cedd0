"""Checkpoints: a safetensors file with every module, average and optimiser state, named by step and content.

A file is written whole, synced and renamed; the two newest are kept. One that does not hash to its name is passed
over for the one before.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..bundle import hash_file
from ..ranks import ALONE, Ranks
from ..sharding import own, part_of, whole

Tensors = dict[str, Tensor]
NAME = re.compile(r"checkpoint-(\d{8})-([0-9a-f]{16})\.safetensors")
KEPT = 2

log = logging.getLogger(__name__)


@dataclass
class State:
    """All that a step changes: what a checkpoint holds."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    averages: Tensors
    sums: dict[str, list[float]] = field(default_factory=dict)  # scalars that were not logged yet
    notes: dict[str, Any] = field(default_factory=dict)  # JSON of others, like the guard's memory


def read_module(folder: Path, role: str) -> Tensors:
    """Return the parameters of one role from a stage's newest checkpoint, by name.

    Raises:
        FileNotFoundError: the stage left no checkpoint with such a role.
    """
    prefix = f"module/{role}/"
    for path in checkpoints(folder)[:1]:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            if names:
                return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    raise FileNotFoundError(
        f"{folder}: expected a checkpoint with the role {role}, found none; run the stage anew"
    )


def save_checkpoint(
    folder: Path,
    step: int,
    state: State,
    identity: str,
    *,
    keep: int | None = None,
    ranks: Ranks = ALONE,
) -> Path | None:
    """Write a checkpoint that `load_checkpoint` restores bit for bit, and drop all but the one before it.

    It holds whole tensors, so it does not depend on how many ranks share them. All ranks must call this at the same
    point; the first one writes, and the others return None.

    Args:
        identity: the hash of what the run is made of; a checkpoint of another identity is refused at load.
        keep: a step whose checkpoint is kept besides.
    """
    tensors: Tensors = {}
    places: set[int] = set()
    for name, value in _tensors(state):
        gathered = whole(value)
        if ranks.is_first:
            tensor = gathered.detach().contiguous()
            place = tensor.untyped_storage().data_ptr()
            # Parameters may share a tensor of their optimiser, like its table of 8-bit values; files hold no such.
            tensors[name] = tensor.clone() if place in places else tensor
            places.add(place)
    if not ranks.is_first:
        return None
    temporary = folder / ".checkpoint.tmp"
    metadata = {"step": str(step), "identity": identity, "sums": json.dumps(state.sums)}
    metadata |= {"notes": json.dumps(state.notes), "numbers": json.dumps(_numbers(state))}
    metadata["optimizers"] = json.dumps(_kinds(state))
    save_file(tensors, temporary, metadata)
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    path = folder / f"checkpoint-{step:08d}-{hash_file(temporary)[:16]}.safetensors"
    temporary.replace(path)
    for old in checkpoints(folder)[KEPT:]:
        if _step(old) != keep:
            old.unlink()
    return path


def checkpoint_bytes(state: State) -> int:
    """Return how large a state's checkpoint is, but for its metadata; its tensors may be on the meta device."""
    return sum(tensor.nbytes for _, tensor in _tensors(state))


def load_checkpoint(folder: Path, state: State, identity: str, *, at: int | None = None) -> int:
    """Restore the newest good checkpoint in place and return its step; 0 when there is none.

    Args:
        at: the step to go back to; later checkpoints are passed over.
    Raises:
        ValueError: it belongs to another run, or there are checkpoints and all are damaged.
    """
    found = [path for path in checkpoints(folder) if at is None or _step(path) <= at]
    for path in found:
        if not _is_good(path):
            log.warning("%s is damaged: going on from the checkpoint before it", path)
            continue
        _restore(path, state, identity)
        return _step(path)
    if found:
        raise ValueError(
            f"{folder}: expected a good checkpoint, all {len(found)} are damaged; delete them to begin anew"
        )
    return 0


def drop_checkpoints(folder: Path, *, except_for: Path) -> None:
    """Delete a folder's checkpoints but one."""
    for path in checkpoints(folder):
        if path != except_for:
            path.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Return a folder's checkpoints, the newest first."""
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _is_good(path: Path) -> bool:
    found = NAME.fullmatch(path.name)
    assert found is not None
    return hash_file(path).startswith(found[2])


def _tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """Name all tensors of a state, in the same order on every rank."""
    for name, value in state.averages.items():
        yield f"average/{name}", value
    for role, module in state.modules.items():
        for name, value in module.state_dict().items():
            yield f"module/{role}/{name}", value
    for name, found in _optimizer_values(state):
        if isinstance(found, Tensor):
            yield name, found


def _numbers(state: State) -> dict[str, int | float]:
    """Name what optimisers keep as plain numbers: bitsandbytes counts its steps so."""
    return {name: value for name, value in _optimizer_values(state) if not isinstance(value, Tensor)}


def _kinds(state: State) -> dict[str, str]:
    return {role: type(optimizer).__name__ for role, optimizer in state.optimizers.items()}


def _optimizer_values(state: State) -> Iterator[tuple[str, Any]]:
    for role, optimizer in state.optimizers.items():
        # By the parameter's place in its network: an optimiser may have them in groups.
        for place, parameter in enumerate(state.modules[role].parameters()):
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"optimizer/{role}/{place}/{key}", value


def _restore(path: Path, state: State, identity: str) -> None:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                raise ValueError(
                    f"{path}: made by another recipe, teacher or data; choose another --out, or delete it"
                )
            kinds, ours = json.loads(metadata.get("optimizers", "null")), _kinds(state)
            if kinds not in (None, ours):
                raise ValueError(
                    f"{path}: expected the optimisers {ours}, found states of {kinds}; set memory.optimizer back"
                )
            _fill(state, file.get_tensor, list(file.keys()), json.loads(metadata.get("numbers", "{}")))
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a checkpoint, got something else ({error}); delete it") from error
    state.sums.clear()
    state.sums.update(json.loads(metadata.get("sums", "{}")))
    state.notes.clear()
    state.notes.update(json.loads(metadata.get("notes", "{}")))


def _fill(
    state: State, read: Callable[[str], Tensor], names: Sequence[str], numbers: Mapping[str, int | float]
) -> None:
    """Set a state to what a checkpoint holds, a tensor at a time; of what is shared out this rank's part."""
    for name, average in state.averages.items():
        own(average).copy_(own(part_of(average, read(f"average/{name}"))))
    for role, module in state.modules.items():
        prefix, now = f"module/{role}/", module.state_dict()
        found = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        module.load_state_dict({n: part_of(now.get(n), read(prefix + n)) for n in found})
    for role, optimizer in state.optimizers.items():
        places = {parameter: place for place, parameter in enumerate(state.modules[role].parameters())}
        states: dict[int, dict[str, Any]] = {}
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        for index, parameter in enumerate(parameters):
            prefix = f"optimizer/{role}/{places[parameter]}/"
            values = {n.removeprefix(prefix): read(n) for n in names if n.startswith(prefix)}
            plain = {n.removeprefix(prefix): value for n, value in numbers.items() if n.startswith(prefix)}
            if values or plain:
                states[index] = plain | {
                    key: part_of(parameter, value) if value.shape == parameter.shape else value
                    for key, value in values.items()
                }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
