"""Inputs for the kernels' tests, and how a result is judged."""

import torch
from torch import Tensor

from flashbulb_kernels.attention.tolerance import closeness
from flashbulb_kernels.tiles import Tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LENGTHS = ((1, 1), (63, 77), (200, 77), (77, 333), (333, 200))
TILE = Tile(block_m=128, block_n=128, num_warps=4, num_stages=1)  # the interpreter's time goes by blocks


def draw(
    device: str, dtype: torch.dtype, *, b: int = 2, h: int = 2, n: int = 63, m: int = 77, d: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q [b, h, n, d], k and v [b, h, m, d], unit normal; the same for the same sizes."""
    generator = torch.Generator().manual_seed(n * m + d)
    shapes = (b, h, n, d), (b, h, m, d), (b, h, m, d)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return q, k, v


def draw_mask(device: str, b: int, m: int) -> Tensor:
    """Draw a key padding mask of scattered holes, with at least one key for each sample."""
    mask = torch.rand(b, m, generator=torch.Generator().manual_seed(b * m)) > 0.5
    mask[:, -1] = True
    return mask.to(device)


def judge(
    results: dict[str, Tensor], truths: tuple[Tensor, ...], plains: tuple[Tensor, ...], terms: float = 1.0
) -> None:
    """Assert that every result is close enough to the truth, and print how close."""
    for (name, result), true, plain in zip(results.items(), truths, plains, strict=True):
        found = closeness(result, true, plain, terms)
        print(f"{name}: {found}")
        assert found.ok, f"{name}: {found}"
