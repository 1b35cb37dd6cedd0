"""What the methods need of a network, whatever its family: an output, and features of its blocks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.schedule import Prediction, Schedule, to_x0


@dataclass(frozen=True, slots=True)
class Condition:
    """Text embeddings: tokens [b, length, width] and pooled [b, width], of width 0 in families without."""

    tokens: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def take(self, rows: Tensor) -> "Condition":
        """Return the given rows, int64 [n]."""
        return Condition(self.tokens[rows], self.pooled[rows])

    def expand(self, count: int) -> "Condition":
        """Repeat a condition of one row `count` times, without copying."""
        return Condition(self.tokens.expand(count, -1, -1), self.pooled.expand(count, -1))

    def to(self, device: torch.device) -> "Condition":
        """Return it on a device."""
        return Condition(self.tokens.to(device), self.pooled.to(device))


def join(first: Condition, second: Condition) -> Condition:
    """Stack two conditions along the batch."""
    return Condition(torch.cat([first.tokens, second.tokens]), torch.cat([first.pooled, second.pooled]))


class Denoiser(nn.Module):
    """A diffusion network: latents xt, times t [b] in [0, 1] and a condition in, an output like xt out.

    Latents are [b, c, h, w] of pictures, [b, c, f, h, w] of videos. Subclasses say what the output means
    (`prediction`, `schedule`), how the network is told the time, and implement `predict`, `blocks`, `feature_map`.
    """

    prediction: Prediction
    schedule: Schedule
    timestep_scale: float = 1000.0
    timestep_offset: float = 0.0
    shift: float = 1.0  # of the times at which it is sampled as a teacher, see `ode_times`

    @property
    def network(self) -> nn.Module:
        """Return the network of diffusers that this wraps.

        Raises:
            ValueError: it wraps none.
        """
        found = next((m for m in self.children() if hasattr(m, "enable_gradient_checkpointing")), None)
        if found is None:
            raise ValueError(f"memory: {type(self).__name__} has no blocks to recompute or to share out")
        return found

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Return the blocks that can be tapped, in the order in which they run."""
        raise NotImplementedError

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the number of channels of each block's features."""
        raise NotImplementedError

    def feature_map(self, output: Any, xt: Tensor) -> Tensor:
        """Read what a block returned as a map [b, width, h, w], of videos [b, width, f, h, w]."""
        raise NotImplementedError

    def features(self, xt: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]) -> list[Tensor]:
        """Return the feature maps after the numbered blocks (from 0), float32."""
        with watched([self.blocks[index] for index in taps]) as outputs:
            self(xt, t, cond)
        return [self.feature_map(outputs[place], xt).float() for place in range(len(taps))]

    def forward(self, xt: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the network's output at times t [b], float32 like xt."""
        return self.predict(xt, self.timestep(t), cond)

    def predict(self, xt: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        """Return the network's output at timesteps [b] in its own units, float32 like xt."""
        raise NotImplementedError

    def timestep(self, t: Tensor) -> Tensor:
        """Return the times [b] as the network is told them, float32."""
        return (t.double() * self.timestep_scale + self.timestep_offset).float()

    def x0(self, xt: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Estimate the clean latents, float32 like xt."""
        return read_x0(self, self(xt, t, cond), xt, t)


def bfloat16(x: Tensor, *, enabled: bool) -> torch.autocast:
    """Return the context that computes in bfloat16 (autocast) on the tensor's device.

    The meta device, on which memory is planned, has none: there the CPU's is switched on, for the planner to see.
    """
    device = x.device.type
    return torch.autocast("cpu" if device == "meta" else device, torch.bfloat16, enabled=enabled)


@contextmanager
def watched(modules: Sequence[nn.Module]) -> Iterator[dict[int, Any]]:
    """Collect what modules return while the context is open, by their place in the list."""
    outputs: dict[int, Any] = {}

    def keep(place: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[place] = output

        return hook

    handles = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def read_x0(denoiser: Denoiser, out: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """Read a denoiser's output at (xt, t [b]) as the clean latents it stands for."""
    at: Tensor = to_x0(denoiser.prediction, denoiser.schedule, out, xt, spread(t, xt))
    return at.to(xt.dtype)  # times may be float64


def spread(t: Tensor, like: Tensor) -> Tensor:
    """Shape times [b] to broadcast over [b, ...]."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def guided_x0(
    denoiser: Denoiser, xt: Tensor, t: Tensor, cond: Condition, uncond: Condition, scale: float
) -> Tensor:
    """Estimate the clean latents with classifier-free guidance: uncond + scale (cond - uncond).

    The same in x0 as in any other prediction, since they are linear in one another at fixed (xt, t).

    Args:
        uncond: one row, the empty prompt. Not used for scale 1.
    """
    if scale == 1:
        return denoiser.x0(xt, t, cond)
    both = join(cond, uncond.expand(len(cond)))
    with_text, without = denoiser.x0(torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)
    return without + scale * (with_text - without)
