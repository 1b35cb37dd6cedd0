"""The fused entry: norm and rotary embedding of q and k inside the attention kernel, values and gradients."""

import pytest
import torch
from torch.library import opcheck

from flashbulb_kernels.attention import Preparation, attention
from flashbulb_kernels.attention.fused import fused_forward
from flashbulb_kernels.attention.operators import attention_fused
from flashbulb_kernels.attention.reference import attention_reference
from flashbulb_kernels.attention.tolerance import plain_attention
from flashbulb_kernels.tiles import HEAD_DIMS, Tile
from flashbulb_kernels.verify import rounded_steps
from support.attention import DTYPES, LENGTHS, TILE, draw, draw_mask, judge

NAMES = ("q_weight", "q_bias", "k_weight", "k_bias")


def preparation(device, dtype, n, d, norm="none", split=0, rope_start=None, affine=True):
    """Draw weights near one, biases near zero, and angles of all sizes."""
    generator = torch.Generator().manual_seed(n + d)
    shape = (2, d) if split else (d,)
    given = {"none": (), "rms": ("q_weight", "k_weight"), "layer": NAMES}[norm] if affine else ()
    drawn = {
        name: (torch.randn(shape, generator=generator) * 0.3 + name.endswith("weight")) for name in given
    }
    if rope_start is not None:
        angle = torch.randn(n - rope_start, d // 2, generator=generator) * 3
        drawn |= {"cos": angle.cos(), "sin": angle.sin()}
    tensors = {
        name: x.to(device, torch.float32 if name in ("cos", "sin") else dtype) for name, x in drawn.items()
    }
    return Preparation(norm=norm, eps=1e-6, split=split, rope_start=rope_start or 0, **tensors)


def replaced(p, change):
    fields = {name: getattr(p, name) for name in Preparation.__dataclass_fields__}
    return Preparation(
        **{name: change(x) if isinstance(x, torch.Tensor) else x for name, x in fields.items()}
    )


def rounded(q, k, v, p, mask=None):
    return plain_attention(*rounded_steps(p, q, k), v, mask, q.shape[-1] ** -0.5)


def check(q, k, v, p, mask=None, tile=TILE):
    scale = q.shape[-1] ** -0.5
    o, _ = fused_forward(q, k, v, mask, p, scale, tile)
    wide = replaced(p, torch.Tensor.double)
    true, _ = attention_reference(*wide.prepare(q.double(), k.double()), v.double(), mask, scale)
    judge({"o": o}, (true,), (rounded(q, k, v, p, mask),))


CASES = {
    "rms": {"norm": "rms"},
    "rms of two segments (SD3.5)": {"norm": "rms", "split": 50},
    "layer": {"norm": "layer"},
    "layer of two segments": {"norm": "layer", "split": 50},
    "layer without weights": {"norm": "layer", "affine": False},
    "rotation": {"rope_start": 0},
    "layer and rotation after the text (CogVideoX)": {"norm": "layer", "rope_start": 17},
    "rms of two segments and rotation": {"norm": "rms", "split": 50, "rope_start": 50},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_preparation_is_right(device, dtype, case):
    q, k, v = draw(device, dtype, n=77, m=77)
    check(3 * q + 1, 3 * k + 1, v, preparation(device, dtype, 77, 64, **case))


@pytest.mark.parametrize("n", [1, 63, 200, 333])
def test_any_length_is_right(device, n):
    q, k, v = draw(device, torch.float16, n=n, m=n)
    check(q, k, v, preparation(device, torch.float16, n, 64, norm="layer", rope_start=0))


@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_cross_attention_may_have_a_norm(device, n, m):
    q, k, v = draw(device, torch.float16, n=n, m=m)
    check(q, k, v, preparation(device, torch.float16, n, 64, norm="rms"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_any_head_dimension_is_right(device, dtype, d):
    q, k, v = draw(device, dtype, n=63, m=63, d=d)
    check(q, k, v, preparation(device, dtype, 63, d, norm="layer", rope_start=5))


@pytest.mark.parametrize("tile", [Tile(32, 64, 4, 1), Tile(64, 32, 4, 1)], ids=str)
def test_any_tile_is_right(device, tile):
    q, k, v = draw(device, torch.float16, n=77, m=77)
    p = preparation(device, torch.float16, 77, 64, norm="rms", split=30, rope_start=30)
    check(q, k, v, p, mask=draw_mask(device, 2, 77), tile=tile)


@pytest.mark.parametrize("impl", ["triton", "reference", "torch"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_reach_q_k_v_and_the_weights(device, impl, case):
    q, k, v = draw(device, torch.float32, n=77, m=77, d=32)
    p = preparation(device, torch.float32, 77, 32, **case)
    grad_o = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)

    def run(tensors, p, compute):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        held = [name for name in NAMES if getattr(p, name) is not None]
        p = replaced(p, lambda x: x.detach().clone().requires_grad_())
        grads = torch.autograd.grad(
            compute(*leaves, p), [*leaves, *(getattr(p, name) for name in held)], grad_o.to(leaves[0].dtype)
        )
        return dict(zip(["dq", "dk", "dv", *held], grads, strict=True))

    def definition(q, k, v, p):
        return attention_reference(*p.prepare(q, k), v, None, 32**-0.5)[0]

    found = run((q, k, v), p, lambda q, k, v, p: attention(q, k, v, preparation=p, impl=impl))
    true = run((x.double() for x in (q, k, v)), replaced(p, torch.Tensor.double), definition)
    plain = run((q, k, v), p, lambda q, k, v, p: rounded(q, k, v, p))
    judge(found, tuple(true.values()), tuple(plain.values()), terms=10.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_do_not_change_a_sample(device, dtype):
    q, k, v = draw(device, dtype, b=3, n=63, m=63)
    p = preparation(device, dtype, 63, 64, norm="layer", rope_start=5)
    alone = attention(q[1:2], k[1:2], v[1:2], preparation=p, impl="triton")
    assert torch.equal(attention(q, k, v, preparation=p, impl="triton")[1], alone[0])


class TestTorch:
    """The operator under torch's own checks."""

    @pytest.fixture(autouse=True)
    def poisoned_memory(self):
        """The poison of the other tests is not for torch's tracers."""

    @pytest.mark.parametrize("impl", ["triton", "reference"])
    def test_operator_passes_opcheck(self, device, impl):
        q, k, v = (x.requires_grad_() for x in draw(device, torch.float32, n=9, m=9, d=32))
        p = preparation(device, torch.float32, 9, 32, norm="layer", split=3, rope_start=3)
        affine = [getattr(p, name).requires_grad_() for name in NAMES]
        opcheck(attention_fused, (q, k, v, None, *affine, p.cos, p.sin, "layer", 1e-6, 3, 3, 0.2, impl))

    def test_compiled_attention_has_the_same_gradients(self, device):
        q, k, v = (x.requires_grad_() for x in draw(device, torch.float32, n=9, m=9, d=32))
        p = preparation(device, torch.float32, 9, 32, norm="rms", rope_start=3)

        def loss(q, k, v):
            return attention(q, k, v, preparation=p, impl="triton").square().sum()

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
        torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norm": "group"}, "expected 'none', 'rms' or 'layer'"),
        ({"norm": "rms", "q_weight": torch.ones(32)}, r"q_weight: expected \[64\] for split=0, got \[32\]"),
        (
            {"norm": "rms", "q_weight": torch.ones(64), "split": 5},
            r"q_weight: expected \[2, 64\] for split=5",
        ),
        ({"norm": "rms", "split": 64}, "split: expected 0 to 63 tokens, got 64"),
        ({"norm": "rms", "k_bias": torch.ones(64)}, "k_bias: the norm 'rms' has none"),
        ({"cos": torch.ones(63, 32)}, "both cos and sin"),
        ({"cos": torch.ones(63, 64), "sin": torch.ones(63, 64)}, r"expected \[63, 32\], .* got \[63, 64\]"),
        ({"cos": torch.ones(63, 32), "sin": torch.ones(63, 32), "rope_start": 9}, r"expected \[54, 32\]"),
    ],
    ids=["norm", "head-dim", "segments", "split", "bias", "one-table", "table-columns", "table-rows"],
)
def test_a_preparation_that_does_not_fit_is_refused(given, message):
    q, k, v = draw("cpu", torch.float32, n=63, m=63)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, preparation=Preparation(**given))


def test_a_rotation_of_cross_attention_is_refused():
    q, k, v = draw("cpu", torch.float32)
    with pytest.raises(ValueError, match="one length, got 63 and 77"):
        attention(q, k, v, preparation=Preparation(cos=torch.ones(63, 32), sin=torch.ones(63, 32)))
