"""`attention`: layouts, strides, batches, the choice of an implementation, and what it refuses."""

import logging

import pytest
import torch

from flashbulb_kernels import tiles
from flashbulb_kernels.attention import attention, availability, dispatch
from flashbulb_kernels.errors import KernelUnavailable
from flashbulb_kernels.verify import differentiated
from support.attention import DTYPES, draw, draw_mask, judge

IMPLS = ("triton", "torch", "reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_implementation_has_the_same_values_and_gradients(device, impl, masked):
    q, k, v = draw(device, torch.float32)
    mask = draw_mask(device, 2, 77) if masked else None
    grad_o = torch.ones_like(q)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = attention(q, k, v, key_padding_mask=mask, impl=impl)
    results = dict(zip(("o", "dq", "dk", "dv"), (o, *torch.autograd.grad(o, leaves, grad_o)), strict=True))
    judge(results, *(differentiated(q, k, v, grad_o, mask, exact=exact) for exact in (True, False)))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_without_keys_gets_zero_and_no_gradient(device, impl):
    q, k, v = (x.requires_grad_() for x in draw(device, torch.float32))
    mask = torch.ones(2, 77, dtype=torch.bool, device=device)
    mask[1] = False
    o = attention(q, k, v, key_padding_mask=mask, impl=impl)
    assert (o[1] == 0).all()
    assert all((gradient[1] == 0).all() for gradient in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_differ_in_strides_alone(device, impl):
    q, k, v = draw(device, torch.float16)
    o = attention(q, k, v, impl=impl)
    tokens_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    found = attention(*tokens_first, layout="bnhd", impl=impl)
    assert torch.equal(found.transpose(1, 2), o)
    assert found.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_give_the_bytes_of_copies(device, dtype):
    """q, k, v as slices of one projection, transposed, with an offset, and with heads shared by expand."""
    packed = torch.randn(2, 50, 3, 2, 40, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    views = [packed[:, 3:, i, :, :32].transpose(1, 2) for i in range(3)]
    views[2] = views[2][:, :1].expand(-1, 2, -1, -1)
    views[1] = views[1].mT.contiguous().mT  # rows are not dense
    grad_o = torch.ones(2, 2, 47, 32, device=device, dtype=dtype)

    def run(tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        o = attention(*leaves, impl="triton")
        return o, *torch.autograd.grad(o, leaves, grad_o)

    for found, expected in zip(run(views), run([x.contiguous() for x in views]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_do_not_change_a_sample(device, dtype, impl):
    """The bytes of a sample alone, in a batch, and beside a sample of NaN; values and gradients."""
    q, k, v = draw(device, dtype, b=3)

    def run(*tensors):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        o = attention(*leaves, impl=impl)
        return o, *torch.autograd.grad(o.sum(), leaves)

    alone = run(*(x[1:2] for x in (q, k, v)))
    batched = run(q, k, v)
    for x in (q, k, v):
        x[0] = float("nan")
    poisoned = run(q, k, v)
    for one, three, beside_nan in zip(alone, batched, poisoned, strict=True):
        assert torch.equal(one[0], three[1])
        assert torch.equal(one[0], beside_nan[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_as_for_torchs_own_attention(device, impl):
    """A norm under autocast gives fp32 while a projection gives bf16: their attention is bf16."""
    q, k, v = (x.requires_grad_() for x in draw(device, torch.float32))
    with torch.autocast(device, dtype=torch.bfloat16):
        o = attention(q, k.bfloat16(), v.bfloat16(), impl=impl)
    assert torch.equal(o, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), impl=impl))
    assert [gradient.dtype for gradient in torch.autograd.grad(o.sum(), (q, k, v))] == [torch.float32] * 3


def test_an_empty_batch_gives_an_empty_result(device):
    q, k, v = draw(device, torch.float16, b=0)
    assert attention(q, k, v, impl="triton").shape == (0, 2, 63, 64)


def test_triton_that_cannot_run_raises(device):
    q, k, v = draw(device, torch.float16, d=24)
    with pytest.raises(KernelUnavailable, match=r"head dimension of 32, 40, .* got 24"):
        attention(q, k, v, impl="triton")
    q, k, v = draw(device, torch.float64)
    with pytest.raises(KernelUnavailable, match=r"got torch\.float64"):
        attention(q, k, v, impl="triton")


def test_triton_on_the_cpu_without_the_interpreter_raises(monkeypatch):
    monkeypatch.setattr(availability, "interpreted", lambda: False)
    with pytest.raises(KernelUnavailable, match="the tensors are on the CPU"):
        attention(*draw("cpu", torch.float16), impl="triton")


def test_a_kernel_without_a_tile_does_not_exist(monkeypatch):
    """The table of tiles says what is shipped: here fp16 of 64 components forward, and nothing backward."""
    row = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 3}
    monkeypatch.setattr(tiles, "_table", lambda: {"forward": {"fp16": {"64": {"sm_80": row}}}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu = torch.device("cuda")
    assert availability.why_not_triton(gpu, torch.float16, 64) is None
    for dtype, head_dim, needs in (
        (torch.bfloat16, 64, {}),
        (torch.float16, 128, {}),
        (torch.float16, 64, {"fused": True}),
        (torch.float16, 64, {"training": True}),
    ):
        reason = availability.why_not_triton(gpu, dtype, head_dim, **needs)
        assert reason is not None and f"head dimension of {head_dim}" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or higher, got 7.5" in str(availability.why_not_triton(gpu, torch.float16, 64))


def test_auto_falls_back_and_says_so_once(device, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_logged", set())
    q, k, v = draw(device, torch.float16, d=24)
    with caplog.at_level(logging.WARNING):
        first = attention(q, k, v)
        attention(q, k, v)
    assert torch.equal(first, attention(q, k, v, impl="torch"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "got 24" in caplog.text


def test_auto_takes_triton_where_it_runs(device):
    q, k, v = draw(device, torch.float16)
    assert dispatch.choose("auto", q) == "triton"
    assert torch.equal(attention(q, k, v), attention(q, k, v, impl="triton"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 63, 64)}, "four dimensions, got 3"),
        ({"k": torch.ones(2, 2, 77, 32)}, "expected k and v of batch 2, 2 heads, head dimension 64"),
        ({"v": torch.ones(2, 2, 76, 64)}, "one length of 1 or more"),
        ({"k": torch.ones(2, 2, 0, 64), "v": torch.ones(2, 2, 0, 64)}, "one length of 1 or more"),
        ({"k": torch.ones(2, 2, 77, 64, dtype=torch.float16)}, "one dtype and one device"),
        ({"key_padding_mask": torch.ones(2, 77)}, r"expected \[2, 77\] bool .* got \[2, 77\] torch.float32"),
        ({"key_padding_mask": torch.ones(2, 63, dtype=torch.bool)}, r"got \[2, 63\]"),
        ({"layout": "nbhd"}, "expected 'bhnd' or 'bnhd'"),
        ({"impl": "cuda"}, "expected 'auto', 'triton', 'torch' or 'reference'"),
    ],
    ids=["rank", "head-dim", "lengths", "no-keys", "dtypes", "mask-dtype", "mask-shape", "layout", "impl"],
)
def test_what_does_not_fit_is_refused(change, message):
    q, k, v = draw("cpu", torch.float32)
    with pytest.raises(ValueError, match=message):
        attention(**{"q": q, "k": k, "v": v} | change)
