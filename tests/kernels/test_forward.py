"""The forward kernel against the definition in fp64. Tolerances: `flashbulb_kernels.attention.tolerance`."""

import pytest
import torch

from flashbulb_kernels.attention.forward import forward
from flashbulb_kernels.attention.reference import attention_reference
from flashbulb_kernels.attention.tolerance import closeness, plain_attention
from flashbulb_kernels.tiles import HEAD_DIMS, Tile
from support.attention import DTYPES, LENGTHS, TILE, draw, draw_mask


def check(q, k, v, mask, tile=TILE):
    scale = q.shape[-1] ** -0.5
    o, lse = forward(q, k, v, mask, scale, tile)
    truth, lse_truth = attention_reference(q.double(), k.double(), v.double(), mask, scale)
    found = closeness(o, truth, plain_attention(q, k, v, mask, scale))
    print(f"o: {found}")
    assert found.ok, found
    torch.testing.assert_close(lse.double(), lse_truth, rtol=1e-5, atol=1e-5)


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
    mask = draw_mask(device, 2, 200)
    mask[1, :150] = False  # a whole first block of padding
    check(q, k, v, mask)


def test_a_query_without_keys_gets_zero(device):
    q, k, v = draw(device, torch.float16)
    mask = torch.ones(2, 77, dtype=torch.bool, device=device)
    mask[1] = False
    o, lse = forward(q, k, v, mask, 0.125, TILE)
    assert (o[1] == 0).all() and (o[0] != 0).any()
    assert (lse[1] == -torch.inf).all() and lse[0].isfinite().all()


def test_large_scores_do_not_overflow(device):
    """exp(300) is infinite in fp32: only differences from the largest score may be raised."""
    q, k, v = draw(device, torch.float32)
    check(q * 30, k * 30, v, mask=None)


def test_offsets_beyond_31_bits_are_addressed(device):
    """Row 40 of a stride of 2**26 elements lies behind 2**31; in int32 the address would be negative.

    The buffer is only reserved: the rows that are touched are a few kilobytes.
    """
    stride, n, d = 2**26, 41, 32
    buffer = torch.UntypedStorage(2 * ((n - 1) * stride + d), device=device)
    far_rows = torch.tensor([], dtype=torch.float16, device=device).set_(
        buffer, 0, (1, 1, n, d), (1, 1, stride, 1)
    )
    q, k, v = draw(device, torch.float16, b=1, h=1, n=n, m=n, d=d)
    far_rows.copy_(k)
    expected, _ = forward(q, k, v, None, d**-0.5, TILE)
    o, _ = forward(q, far_rows, v, None, d**-0.5, TILE)
    assert torch.equal(o, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_that_drops_one_key_would_be_seen(device, dtype):
    q, k, v = draw(device, dtype)
    truth, _ = attention_reference(q.double(), k.double(), v.double(), None, 0.125)
    o, _ = forward(q, k[:, :, :-1], v[:, :, :-1], None, 0.125, TILE)
    assert not closeness(o, truth, plain_attention(q, k, v, None, 0.125)).ok
