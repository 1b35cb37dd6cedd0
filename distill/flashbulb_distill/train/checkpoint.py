"""Checkpoints: one safetensors file with every module, average and optimiser state, replaced atomically."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

Tensors = dict[str, Tensor]


def save_checkpoint(
    path: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    averages: Tensors,
    identity: str,
) -> None:
    """Write a checkpoint that `load_checkpoint` restores bit for bit.

    Args:
        identity: the hash of what the run is made of; a checkpoint of another identity is refused at load.
    """
    tensors: Tensors = {f"average/{name}": value for name, value in averages.items()}
    for role, module in modules.items():
        tensors |= {f"module/{role}/{name}": value for name, value in module.state_dict().items()}
    for role, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer/{role}/{index}/{key}"] = value
    temporary = path.with_suffix(".tmp")
    metadata = {"step": str(step), "identity": identity}
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary, metadata)
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)


def load_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    averages: Tensors,
    identity: str,
) -> int:
    """Restore everything in place and return the step.

    Raises:
        ValueError: the file is damaged, or belongs to another run.
    """
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a checkpoint, got a damaged file ({error}); delete it") from error
    if metadata.get("identity") != identity:
        raise ValueError(
            f"{path}: made by another recipe, teacher or data; choose another --out, or delete it"
        )
    with torch.no_grad():
        for name, value in averages.items():
            value.copy_(tensors[f"average/{name}"])
    for role, module in modules.items():
        module.load_state_dict(_under(tensors, f"module/{role}/"))
    for role, optimizer in optimizers.items():
        states: dict[int, Tensors] = {}
        for name, value in _under(tensors, f"optimizer/{role}/").items():
            index, key = name.split("/")
            states.setdefault(int(index), {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
    return int(metadata["step"])


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
