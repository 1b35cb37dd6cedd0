"""Several networks in one: a frozen backbone whose linear layers carry low-rank adapters, at most one of them on.

    on:   W x + (alpha / rank) B A x        off: W x, bit for bit the backbone

So one copy of the weights serves as teacher and as the discriminator's features (off), as student and as fake score (an
adapter each). Source: Hu et al. 2021 (LoRA, arXiv 2106.09685).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError
from ..teachers.denoiser import Condition, Denoiser

# Attention of UNets and transformers, and the joint attention's text side.
ATTENTION = r"(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"


class Switch:
    """Which adapter is on; None is the backbone alone."""

    def __init__(self) -> None:
        self.name: str | None = None

    @contextmanager
    def on(self, name: str | None) -> Iterator[None]:
        """Turn one adapter on, or all off."""
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before


class LoraLinear(nn.Module):
    """A frozen linear layer with low-rank adapters by name."""

    def __init__(self, base: nn.Linear, switch: Switch) -> None:
        super().__init__()
        self.base = base
        self.switch = switch
        self._factors: dict[str, tuple[nn.Parameter, nn.Parameter, float]] = {}

    def add(self, name: str, rank: int, alpha: float) -> tuple[nn.Parameter, nn.Parameter]:
        """Add an adapter that begins as nothing, float32; return its A [rank, in] and B [out, rank]."""
        device = self.base.weight.device
        down = torch.empty(rank, self.base.in_features, device=device)
        nn.init.kaiming_uniform_(down, a=5**0.5)
        factors = nn.Parameter(down), nn.Parameter(torch.zeros(self.base.out_features, rank, device=device))
        self._factors[name] = (*factors, alpha / rank)
        return factors

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter that is on."""
        out: Tensor = self.base(x)
        if (name := self.switch.name) is None or name not in self._factors:
            return out
        down, up, scale = self._factors[name]
        return out + scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


class Adapted(Denoiser):
    """A frozen backbone with one adapter on. Its parameters are the adapter's alone."""

    def __init__(
        self, backbone: Denoiser, switch: Switch, name: str, factors: Mapping[str, nn.Parameter]
    ) -> None:
        super().__init__()
        self.prediction, self.schedule = backbone.prediction, backbone.schedule
        self.timestep_scale, self.timestep_offset = backbone.timestep_scale, backbone.timestep_offset
        self.shift = backbone.shift
        self._backbone = (backbone,)  # a tuple, so that it is no submodule
        self._switch, self._name = switch, name
        self.factors = nn.ParameterDict({key.replace(".", "/"): value for key, value in factors.items()})

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Return the backbone's blocks."""
        return self._backbone[0].blocks

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the widths of the backbone's blocks."""
        return self._backbone[0].widths

    def feature_map(self, output: Any, xt: Tensor) -> Tensor:
        """Read what a block returned."""
        return self._backbone[0].feature_map(output, xt)

    def predict(self, xt: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """Return the network's output."""
        with self._switch.on(self._name):
            return self._backbone[0].predict(xt, timestep, cond)


def targeted(backbone: nn.Module, targets: str) -> dict[str, nn.Linear | LoraLinear]:
    """Return the linear layers, those with adapters too, whose names a regular expression finds.

    Raises:
        UsageError: it finds none.
    """
    layers: dict[str, nn.Linear | LoraLinear] = {}
    for name, layer in backbone.named_modules():
        parent = backbone.get_submodule(name.rpartition(".")[0])
        if (
            isinstance(layer, (nn.Linear, LoraLinear))
            and not isinstance(parent, LoraLinear)
            and re.search(targets, name)
        ):
            layers[name] = layer
    if not layers:
        raise UsageError(f"lora.targets: expected the name of a linear layer, none matches {targets!r}")
    return layers


class SharedBackbone:
    """A frozen network that becomes several: `adapter` makes another one of it.

    Args:
        backbone: whose linear layers are wrapped, in place; it stays what it was.
        targets: a regular expression of the layers' names.
    Raises:
        UsageError: no linear layer has such a name.
    """

    def __init__(self, backbone: Denoiser, *, targets: str = ATTENTION) -> None:
        self.backbone = backbone
        self.layers: dict[str, LoraLinear] = {}
        self.switch = Switch()
        for name, layer in targeted(backbone, targets).items():
            if isinstance(layer, LoraLinear):  # the stage before shared this backbone too
                self.switch = layer.switch
                self.layers[name] = layer
            else:
                self.layers[name] = LoraLinear(layer, self.switch)
                parent, _, last = name.rpartition(".")
                setattr(backbone.get_submodule(parent), last, self.layers[name])
        backbone.requires_grad_(False)

    def adapter(self, name: str, *, rank: int, alpha: float) -> Adapted:
        """Return the network with a new adapter on, which begins as the backbone."""
        factors: dict[str, nn.Parameter] = {}
        for layer_name, layer in self.layers.items():
            down, up = layer.add(name, rank, alpha)
            factors |= {f"{layer_name}.lora_A.weight": down, f"{layer_name}.lora_B.weight": up}
        return Adapted(self.backbone, self.switch, name, factors)


@torch.no_grad()
def share_down(of: Adapted, to: Adapted) -> None:
    """Give an adapter that begins as nothing the A of another one.

    Where A is one, a mixture of factors is the mixture of weights: (1 - s) B A + s B' A = ((1 - s) B + s B') A.
    """
    for name, theirs in of.factors.items():
        if name.endswith("/lora_A/weight"):
            to.factors[name].copy_(theirs)


@torch.no_grad()
def merge(denoiser: Denoiser, values: Mapping[str, Tensor], *, rank: int, alpha: float) -> None:
    """Add an adapter's parameters, by their names in `Adapted`, to a network's own weights."""
    for key, down in values.items():
        if not key.endswith("/lora_A/weight"):
            continue
        up = values[key.replace("/lora_A/", "/lora_B/")]
        name = key.removeprefix("factors.").removesuffix("/lora_A/weight").replace("/", ".")
        weight = cast(nn.Linear, denoiser.get_submodule(name)).weight
        weight += (alpha / rank) * (up @ down).to(weight)  # its device as well: the values come from a file


def diffusers_names(values: Mapping[str, Tensor], *, rank: int, alpha: float) -> dict[str, Tensor]:
    """Return an adapter's parameters as diffusers' `load_lora_weights` reads them; the scale is part of B."""
    scaled = {}
    for key, value in values.items():
        name = key.removeprefix("factors.").replace("/", ".")
        scaled[name] = value * (alpha / rank if name.endswith("lora_B.weight") else 1.0)
    return scaled


def checkpoint_blocks(denoiser: Denoiser, switch: Switch | None = None) -> None:
    """Recompute a network's blocks in the backward pass instead of keeping their activations.

    A block is recomputed with the adapter that was on when it first ran, whichever is on by then.

    Raises:
        ValueError: it has no such blocks.
    """

    def recomputed(block: Callable[..., Any], *args: Any) -> Any:
        name = switch.name if switch is not None else None

        def run(*inputs: Any) -> Any:
            if switch is None:
                return block(*inputs)
            with switch.on(name):
                return block(*inputs)

        return checkpoint(run, *args, use_reentrant=False)

    cast(Any, denoiser.network).enable_gradient_checkpointing(recomputed)
