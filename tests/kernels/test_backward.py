"""The backward kernels against autograd through the definition in fp64, and the reference's own backward pass."""

from dataclasses import replace

import pytest
import torch

from flashbulb_kernels.aot import ARCHS
from flashbulb_kernels.attention import availability
from flashbulb_kernels.attention.backward import backward
from flashbulb_kernels.attention.forward import forward
from flashbulb_kernels.attention.reference import attention_backward_reference, attention_reference
from flashbulb_kernels.attention.tolerance import closeness
from flashbulb_kernels.tiles import HEAD_DIMS, Tile, backward_entries, has_tile, tile_for
from flashbulb_kernels.verify import differentiated
from support.attention import DTYPES, LENGTHS, TILE, draw, draw_mask, judge

TILES = {"delta": TILE, "dkdv": TILE, "dq": TILE}


def gradients(q, k, v, mask, grad_o, tiles=TILES, grad_lse=None):
    scale = q.shape[-1] ** -0.5
    o, lse = forward(q, k, v, mask, scale, TILE)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    return backward(grad_o, grad_lse, q, k, v, o, lse, mask, scale, tiles)


def check(q, k, v, mask, tiles=TILES):
    grad_o = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    found = dict(zip(("dq", "dk", "dv"), gradients(q, k, v, mask, grad_o, tiles), strict=True))
    exact, plain = (differentiated(q, k, v, grad_o, mask, exact=exact) for exact in (True, False))
    judge(found, exact[1:], plain[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_gradients_are_right_at_any_length(device, dtype, n, m):
    check(*draw(device, dtype, n=n, m=m), mask=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_gradients_are_right_at_any_head_dimension(device, dtype, d):
    check(*draw(device, dtype, d=d), mask=None)


@pytest.mark.parametrize("tile", [Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), Tile(16, 16, 4, 1)], ids=str)
def test_gradients_are_right_for_any_tile(device, tile):
    check(*draw(device, torch.float16, n=77, m=63), mask=None, tiles=dict.fromkeys(TILES, tile))


def shipped_cuts():
    """List how the table of tiles cuts backward passes: (dtype, head dimension, columns and owned pieces by entry)."""
    cuts = {}
    for dtype, name in availability.DTYPES.items():
        for d in HEAD_DIMS:
            for arch in ARCHS:
                entries = backward_entries(name, d, arch)
                if not all(has_tile(entry, name, d, arch) for entry in entries):
                    continue
                tiles = {entry: tile_for(entry, name, d, arch) for entry in entries}
                cut = tuple((entry, tile.columns, tile.owned) for entry, tile in tiles.items())
                if "dk" in tiles or any(tile.columns for tile in tiles.values()):
                    cuts.setdefault((name, d, cut), (dtype, d, cut))
    return list(cuts.values())


def named(value):
    return (
        "-".join(f"{entry}{columns}x{owned}" for entry, columns, owned in value)
        if isinstance(value, tuple)
        else str(value)
    )


@pytest.mark.parametrize(("dtype", "d", "cut"), shipped_cuts(), ids=named)
def test_every_shipped_cut_of_a_head_gives_the_gradients(device, dtype, d, cut):
    """In the interpreter's large blocks: what is at stake is which columns go where, by whom, and that none is left."""
    tiles = {entry: replace(TILE, columns=columns, owned=owned) for entry, columns, owned in cut}
    check(*draw(device, dtype, d=d), mask=None, tiles=tiles)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize(("d", "columns", "owned"), [(80, 16, 2), (64, 32, 1), (40, 32, 1), (160, 32, 3)])
def test_gradients_are_right_in_parts(device, d, columns, owned, apart):
    """A last part may own less than the others, and a last piece may hold less: nothing is written beyond a head."""
    tile = replace(TILE, columns=columns, owned=owned)
    tiles = dict.fromkeys(("delta", "dk", "dv", "dq") if apart else ("delta", "dkdv", "dq"), tile)
    mask = draw_mask(device, 2, 77)
    check(*draw(device, torch.float16, d=d), mask, tiles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_keys_get_no_gradient(device, dtype):
    q, k, v = draw(device, dtype, n=63, m=200)
    mask = draw_mask(device, 2, 200)
    check(q, k, v, mask)
    _, dk, dv = gradients(q, k, v, mask, torch.ones_like(q))
    padded = ~mask[:, None, :, None].expand_as(dk)
    assert (dk[padded] == 0).all() and (dv[padded] == 0).all()


def test_a_query_without_keys_gives_no_gradient(device):
    q, k, v = draw(device, torch.float16)
    mask = torch.ones(2, 77, dtype=torch.bool, device=device)
    mask[1] = False
    for gradient in gradients(q, k, v, mask, torch.ones_like(q)):
        assert (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_the_gradient_of_the_log_sum_exp_is_right(device):
    q, k, v = draw(device, torch.float32)
    grad_o, grad_lse = torch.zeros_like(q), torch.randn(q.shape[:3]).to(q)
    leaves = [x.double().requires_grad_() for x in (q, k)]
    lse = attention_reference(*leaves, v.double(), None, 0.125)[1]
    dq_truth, dk_truth = torch.autograd.grad(lse, leaves, grad_lse.double())
    dq, dk, dv = gradients(q, k, v, None, grad_o, grad_lse=grad_lse)
    torch.testing.assert_close(dq.double(), dq_truth, rtol=0, atol=2e-6)
    torch.testing.assert_close(dk.double(), dk_truth, rtol=0, atol=2e-6)
    assert (dv == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_gradients_are_those_of_autograd(masked):
    q, k, v = draw("cpu", torch.float64, n=5, m=7, d=32)
    mask = draw_mask("cpu", 2, 7) if masked else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = attention_reference(*leaves, mask, 0.3)
    grad_o, grad_lse = torch.randn_like(o), torch.randn_like(lse)
    expected = torch.autograd.grad((o, lse), leaves, (grad_o, grad_lse))
    found = attention_backward_reference(
        grad_o, grad_lse, *(x.detach() for x in (q, k, v, o, lse)), mask, 0.3
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_that_forgets_delta_would_be_seen(device, dtype):
    """delta is a small correction of dQ: the tolerance has to be tight enough for it."""
    q, k, v = draw(device, dtype)
    grad_o = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    o, lse = forward(q, k, v, None, 0.125, TILE)
    dq, _, _ = backward(grad_o, torch.zeros_like(lse), q, k, v, torch.zeros_like(o), lse, None, 0.125, TILES)
    exact, plain = (differentiated(q, k, v, grad_o, None, exact=exact)[1] for exact in (True, False))
    assert not closeness(dq, exact, plain).ok
