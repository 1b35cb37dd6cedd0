"""The forward kernel against the definition in fp64. Tolerances: `flashbulb_kernels.attention.tolerance`."""

import pytest
import torch

from flashbulb_kernels.attention.forward import forward
from flashbulb_kernels.attention.reference import attention_reference
from flashbulb_kernels.attention.tolerance import closeness, plain_attention
from flashbulb_kernels.tiles import HEAD_DIMS, Tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LENGTHS = ((1, 1), (63, 77), (200, 77), (77, 333), (333, 200))
TILE = Tile(block_m=128, block_n=128, num_warps=4, num_stages=1)  # the interpreter's time goes by blocks


def check(q, k, v, mask, tile=TILE):
    scale = q.shape[-1] ** -0.5
    o, lse = forward(q, k, v, mask, scale, tile)
    truth, lse_truth = attention_reference(q.double(), k.double(), v.double(), mask, scale)
    found = closeness(o, truth, plain_attention(q, k, v, mask, scale))
    print(f"o: {found}")
    assert found.ok, found
    torch.testing.assert_close(lse.double(), lse_truth, rtol=1e-5, atol=1e-5)


def draw(device, dtype, b=2, h=2, n=63, m=77, d=64):
    generator = torch.Generator().manual_seed(n * m + d)
    shapes = (b, h, n, d), (b, h, m, d), (b, h, m, d)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_any_length_is_right(device, dtype, n, m):
    check(*draw(device, dtype, n=n, m=m), mask=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_any_head_dimension_is_right(device, dtype, d):
    check(*draw(device, dtype, d=d), mask=None)


@pytest.mark.parametrize("tile", [Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), Tile(16, 16, 4, 1)], ids=str)
def test_any_tile_is_right(device, tile):
    check(*draw(device, torch.float16, n=77, m=63), mask=None, tile=tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_keys_count_for_nothing(device, dtype):
    q, k, v = draw(device, dtype, n=63, m=200)
    mask = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)).to(device) > 0.5
    mask[1, :150] = False  # a whole first block of padding
    check(q, k, v, mask)


def test_a_query_without_keys_gets_zero(device):
    q, k, v = draw(device, torch.float16)
    mask = torch.ones(2, 77, dtype=torch.bool, device=device)
    mask[1] = False
    o, lse = forward(q, k, v, mask, 0.125, TILE)
    assert (o[1] == 0).all() and (o[0] != 0).any()
    assert (lse[1] == -torch.inf).all() and lse[0].isfinite().all()
