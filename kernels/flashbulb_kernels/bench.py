"""How fast is attention on this GPU? Layers of SDXL, SD3, SD3.5 and CogVideoX, ours against torch's own attention."""

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Preparation, attention
from .attention.availability import DTYPES, arch_of
from .tiles import has_backward

Timer = Callable[[Callable[[], object]], tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class Layer:
    """An attention layer of a real checkpoint at the size it was made for, for one sample.

    Args:
        n, m: tokens of q and of k and v; `text` of them are text.
        norm, rotary: what q and k pass through first.
    """

    family: str
    name: str
    heads: int
    n: int
    m: int
    d: int = 64
    text: int = 0
    norm: Literal["none", "rms", "layer"] = "none"
    rotary: bool = False


# 1024 x 1024 pixels: 128 x 128 latents, 64 x 64 patches; the UNet attends at 64 x 64 and 32 x 32. Text: 77 tokens of
# CLIP, and 256 of T5. CogVideoX: 49 frames of 480 x 720, 13 x 30 x 45 patches and 226 tokens of T5.
LAYERS = (
    Layer("sdxl", "self 64x64", 10, 4096, 4096),
    Layer("sdxl", "cross 64x64", 10, 4096, 77),
    Layer("sdxl", "self 32x32", 20, 1024, 1024),
    Layer("sdxl", "cross 32x32", 20, 1024, 77),
    Layer("sd3", "medium, joint", 24, 4429, 4429, text=333),
    Layer("sd35", "medium, joint", 24, 4429, 4429, text=333, norm="rms"),
    Layer("sd35", "medium, image alone", 24, 4096, 4096, norm="rms"),
    Layer("sd35", "large, joint", 38, 4429, 4429, text=333, norm="rms"),
    Layer("cogvideox", "2b, joint", 30, 17776, 17776, text=226, norm="layer"),
    Layer("cogvideox", "5b, joint", 48, 17776, 17776, text=226, norm="layer", rotary=True),
)
FAMILIES = tuple(dict.fromkeys(layer.family for layer in LAYERS))


@dataclass(frozen=True, slots=True)
class Row:
    """Times of one layer in milliseconds, median and the 20th and 80th percentile.

    Args:
        work: "forward", or "training" for forward and backward.
        tflops: of the matrix products, at our median.
    """

    family: str
    layer: str
    work: str
    ours_ms: tuple[float, float, float]
    torch_ms: tuple[float, float, float]
    tflops: float

    @property
    def speedup(self) -> float:
        """Return how many times faster ours is, by the medians."""
        return self.torch_ms[0] / self.ours_ms[0]


def bench(
    layers: Sequence[Layer], *, batch: int, dtype: torch.dtype, device: torch.device, timer: Timer
) -> Iterator[Row]:
    """Time every layer, forward and, where there are kernels for gradients, training; ours and torch's in turn.

    Args:
        batch: samples per call.
        timer: runs a function and returns its median, 20th and 80th percentile in milliseconds.
    """
    for layer in layers:
        q, k, v = _draw(layer, batch, dtype, device)
        preparation = _preparation(layer, dtype, device)
        trains = has_backward(DTYPES[dtype], layer.d, arch_of(device))
        for work, products in (("forward", 2), *([("training", 2 + 5)] if trains else [])):
            ours, theirs = (
                timer(_call(q, k, v, preparation, layer, run, work)) for run in (by_triton, by_torch)
            )
            flops = products * 2 * batch * layer.heads * layer.n * layer.m * layer.d
            yield Row(layer.family, layer.name, work, ours, theirs, flops / ours[0] / 1e9)


def gpu_timer(function: Callable[[], object]) -> tuple[float, float, float]:
    """Time a function on the GPU, with L2 emptied between runs."""
    from triton.testing import do_bench

    median, low, high = do_bench(function, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out as a table."""
    head = f"{'family':<10} {'layer':<20} {'work':<9} {'ours ms':>9} {'torch ms':>9} {'faster':>7} {'TFLOP/s':>8}"
    lines = [
        f"{row.family:<10} {row.layer:<20} {row.work:<9} {row.ours_ms[0]:>9.3f} {row.torch_ms[0]:>9.3f} "
        f"{row.speedup:>6.2f}x {row.tflops:>8.1f}"
        for row in rows
    ]
    return "\n".join((head, *lines))


def report(rows: Sequence[Row], *, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what a result file holds: the machine, the versions and the rows."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "rows": [asdict(row) | {"speedup": row.speedup} for row in rows],
    }


def _draw(
    layer: Layer, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v as a projection lays them: [b, n, h, d]."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(batch, tokens, layer.heads, layer.d) for tokens in (layer.n, layer.m, layer.m)]
    q, k, v = (torch.randn(s, generator=generator, device=device, dtype=dtype) for s in shapes)
    return q, k, v


def _preparation(layer: Layer, dtype: torch.dtype, device: torch.device) -> Preparation | None:
    if layer.norm == "none":
        return None
    split = layer.n - layer.text if layer.norm == "rms" and layer.text else 0
    one = torch.ones((2, layer.d) if split else (layer.d,), device=device, dtype=dtype)
    bias = torch.zeros_like(one) if layer.norm == "layer" else None
    tables = {}
    if layer.rotary:
        angle = torch.linspace(0, 100, (layer.n - layer.text) * layer.d // 2, device=device)
        angle = angle.view(-1, layer.d // 2)
        tables = {"cos": angle.cos(), "sin": angle.sin()}
    start = layer.text if layer.rotary else 0
    return Preparation(layer.norm, 1e-6, one, bias, one, bias, split, rope_start=start, **tables)


def by_triton(q: Tensor, k: Tensor, v: Tensor, preparation: Preparation | None, layer: Layer) -> Tensor:
    """Compute a layer with our kernels."""
    return attention(q, k, v, preparation=preparation, layout="bnhd", impl="triton")


def by_torch(q: Tensor, k: Tensor, v: Tensor, preparation: Preparation | None, layer: Layer) -> Tensor:
    """Compute a layer as diffusers does: torch's own norms, a rotation in fp32, scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    p = preparation
    if p is not None and p.q_weight is not None:
        weight = p.q_weight[0] if p.split else p.q_weight  # both segments have ones
        if p.norm == "rms":
            q, k = (F.rms_norm(x, (layer.d,), weight, p.eps) for x in (q, k))
        else:
            q, k = (F.layer_norm(x, (layer.d,), weight, p.q_bias, p.eps) for x in (q, k))
    if p is not None and p.cos is not None and p.sin is not None:
        q, k = (_rotated(x, p.cos, p.sin, p.rope_start) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
    video = x[:, :, start:].float()
    even, odd = video[..., 0::2], video[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(3)
    return torch.cat((x[:, :, :start], turned.to(x.dtype)), dim=2)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    preparation: Preparation | None,
    layer: Layer,
    run: Callable[[Tensor, Tensor, Tensor, Preparation | None, Layer], Tensor],
    work: str,
) -> Callable[[], object]:
    if work == "forward":

        def forward() -> object:
            with torch.no_grad():
                return run(q, k, v, preparation, layer)

        return forward

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    grad_o = torch.ones_like(q)

    def training() -> object:
        return torch.autograd.grad(run(leaves[0], leaves[1], leaves[2], preparation, layer), leaves, grad_o)

    return training
