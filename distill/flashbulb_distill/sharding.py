"""Networks whose blocks' weights are shared out over the ranks (FSDP2): each rank keeps its rows, and gathers a block's
whole weights while the block runs.

What lies outside the blocks (embeddings, the last layer) stays whole on every rank. A block's own output is always on
the way back of a gradient, which is what tells FSDP2 to gather it again; the network's output is not, where a
discriminator reads the blocks' features.
"""

import warnings
from collections.abc import Sequence
from typing import cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_LEAF = "gathered"  # the attribute of a rank's rows that names the tensor which autograd sees in their place


def shard(network: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Share out the weights of a network's blocks over all ranks, in place; nothing where they are already.

    Args:
        network: what is called, and has the blocks below it.
    """
    if isinstance(network, FSDPModule):
        return
    shared = {parameter for block in blocks for parameter in block.parameters()}
    device = next(iter(shared)).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    kept = {p for p in network.parameters() if not isinstance(p, DTensor)}
    # The network itself holds nothing then, but orders the gathering of its blocks; nothing is done to its output in
    # place, of which it warns.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
    fully_shard(network, mesh=mesh, ignored_params=kept)
    for block in blocks:
        rows = list(block.parameters())
        unit = cast(FSDPModule, block)
        unit.unshard()
        for parameter, whole in zip(rows, list(block.parameters()), strict=True):
            setattr(parameter, _LEAF, whole)
        unit.reshard()


def is_shared(tensor: Tensor) -> bool:
    """Tell whether this rank has a part of the tensor only."""
    return isinstance(tensor, DTensor)


def leaf(parameter: Tensor) -> Tensor:
    """Return the tensor that autograd knows: of a shared parameter the one that is gathered while a block runs."""
    gathered: Tensor = getattr(parameter, _LEAF, parameter)
    return gathered


def own(tensor: Tensor) -> Tensor:
    """Return this rank's part, which has the tensor's own memory. No gradient passes."""
    if isinstance(tensor, DTensor):
        return cast(DTensor, tensor.detach()).to_local()
    return tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; a shared one is gathered onto the CPU, and all ranks must ask at the same point."""
    if isinstance(tensor, DTensor):
        return cast(DTensor, tensor.detach()).full_tensor().cpu()
    return tensor


def part_of(like: Tensor | None, value: Tensor) -> Tensor:
    """Return a whole value, the same on every rank, shared out as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
