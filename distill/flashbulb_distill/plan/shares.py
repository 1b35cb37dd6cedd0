"""What several GPUs share out: weights, gradients, moments and average of the large networks' blocks.

It is told by arithmetic beside a step of one process on the meta device: a block's gradient is counted until it has
arrived, and one GPU's part of it from then on; the blocks that are gathered at a time are added.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..networks.lora import Adapted
from ..teachers.denoiser import Denoiser

GATHERED = 2  # blocks at a time: the one that runs and the one that is fetched ahead


class Shares:
    """One GPU's share of networks among `gpus`; all of them for 1."""

    def __init__(self, networks: Mapping[str, nn.Module], gpus: int) -> None:
        self.gpus = gpus
        self.blocks: list[list[nn.Parameter]] = []
        if gpus > 1:
            for network in networks.values():
                if isinstance(network, Denoiser) and not isinstance(network, Adapted):
                    self.blocks += [list(block.parameters()) for block in network.blocks]
        self._shared = {parameter for block in self.blocks for parameter in block}

    def bytes_of(self, tensors: Sequence[tuple[Tensor, Tensor]]) -> int:
        """Return one GPU's bytes of tensors, each beside the parameter that it belongs to."""
        whole = sum(tensor.nbytes for tensor, parameter in tensors if not self._is_shared(tensor, parameter))
        shared = sum(tensor.nbytes for tensor, parameter in tensors if self._is_shared(tensor, parameter))
        return whole + -(-shared // self.gpus)

    def _is_shared(self, tensor: Tensor, parameter: Tensor) -> bool:
        return parameter in self._shared and tensor.shape == parameter.shape

    @property
    def gathered_bytes(self) -> int:
        """The most that whole blocks take beside the parts: their weights, and gradients where they are trained."""
        weights = max((sum(p.nbytes for p in block) for block in self.blocks), default=0)
        gradients = max((sum(p.nbytes for p in block if p.requires_grad) for block in self.blocks), default=0)
        return GATHERED * (weights + gradients)

    def updating_bytes(self, optimizer: Optimizer) -> int:
        """Return what updating the shared parameters takes: gradients, and two temporaries of their size."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p in self._shared]
        size: int = sum(p.nbytes for p in parameters)
        return 3 * -(-size // self.gpus)

    @contextmanager
    def reduced(self, optimizers: Sequence[Optimizer]) -> Iterator[None]:
        """While open, a shared parameter's gradient gives way to one GPU's part of it, until its optimiser's update."""
        parts: dict[Tensor, Tensor] = {}

        def reduce(parameter: Tensor) -> None:
            if parameter not in parts:
                parts[parameter] = parameter.new_empty(-(-parameter.numel() // self.gpus))
            parameter.grad = None

        def updated(optimizer: Optimizer, *unused: object) -> None:
            parts.clear()

        trained = [p for p in self._shared if p.requires_grad]
        handles: list[Any] = [cast(Any, p).register_post_accumulate_grad_hook(reduce) for p in trained]
        handles += [optimizer.register_step_post_hook(updated) for optimizer in optimizers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def tensors_of(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return a network's parameters and buffers, each beside itself."""
    return [(tensor, tensor) for tensor in [*network.parameters(), *network.buffers()]]


def moments_of(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Return an optimiser's moments, each beside its parameter."""
    return [
        (value, parameter)
        for parameter, values in optimizer.state.items()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    ]
