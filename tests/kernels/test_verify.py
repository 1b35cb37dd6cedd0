"""The gate before any speed: it passes on these kernels, and a planted fault fails it."""

import pytest
import torch

from flashbulb_kernels.attention import availability, backward, forward
from flashbulb_kernels.tiles import HEAD_DIMS, has_backward, has_tile
from flashbulb_kernels.verify import Case, cases, verify

RIGHT_FORWARD, RIGHT_BACKWARD = forward.forward, backward.backward
SOME = [
    Case(63, 77, 64, torch.float16),
    Case(63, 200, 64, torch.bfloat16, masked=True),
    Case(200, 200, 64, torch.float32, prepared="rms of two segments"),
    Case(200, 200, 64, torch.float32, prepared="layer and rotation"),
]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_right_kernels_pass(device, case):
    (verdict,) = verify(torch.device(device), [case])
    assert verdict.ok, verdict


def test_the_list_has_odd_lengths_every_head_dimension_masks_and_norms():
    listed = cases([torch.float16])
    assert {case.d for case in listed} == {32, 40, 64, 80, 96, 128, 160}
    assert {1, 63, 77, 200, 333} <= {case.n for case in listed} | {case.m for case in listed}
    assert any(case.masked for case in listed)
    assert {case.prepared for case in listed} == {"", "rms of two segments", "layer and rotation"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_every_forward_kernel_is_verified_and_gradients_where_there_are_kernels(arch):
    """A kernel without a backward pass was left out, while `auto` takes it for inference: all of fp32 was."""
    listed = cases([*availability.DTYPES], arch)
    for dtype, name in availability.DTYPES.items():
        found = {case.d: case.gradients for case in listed if case.dtype == dtype and not case.prepared}
        exist = [d for d in HEAD_DIMS if has_tile("forward", name, d, arch)]
        assert found == {d: has_backward(name, d, arch) for d in exist}
        assert any(case.prepared for case in listed if case.dtype == dtype)
    assert any(case.gradients for case in listed) and not all(case.gradients for case in listed)


def test_a_case_of_values_alone_asks_for_no_gradient(device, monkeypatch):
    monkeypatch.setattr(backward, "backward", lambda *_: pytest.fail("gradients were asked for"))
    (verdict,) = verify(torch.device(device), [Case(63, 77, 32, torch.float32, gradients=False)])
    assert verdict.ok and [*verdict.found] == ["o"]
    assert str(verdict).startswith("63x77 d32 float32 values alone: o ")


def tilted(q, k, v, mask, scale, tile):
    return RIGHT_FORWARD(q, k, v, mask, 1.1 * scale, tile)


def forgetful(q, k, v, mask, scale, tile):
    return RIGHT_FORWARD(q, k[:, :, :-1], v[:, :, :-1], mask, scale, tile)


def silent(q, k, v, mask, scale, tile):
    o, lse = RIGHT_FORWARD(q, k, v, mask, scale, tile)
    return torch.zeros_like(o), lse


def unwritten(q, k, v, mask, scale, tile):
    o, lse = RIGHT_FORWARD(q, k, v, mask, scale, tile)
    o[-1, -1, -1, -1] = torch.nan
    return o, lse


@pytest.mark.parametrize("fault", [tilted, forgetful, silent, unwritten])
def test_a_wrong_forward_kernel_fails(device, monkeypatch, fault):
    monkeypatch.setattr(forward, "forward", fault)
    (verdict,) = verify(torch.device(device), SOME[:1])
    assert not verdict.ok


@pytest.mark.parametrize("wrong", [0, 1, 2], ids=["dq", "dk", "dv"])
def test_a_wrong_gradient_fails(device, monkeypatch, wrong):
    def skewed(*arguments):
        gradients = RIGHT_BACKWARD(*arguments)
        gradients[wrong].mul_(1.02)
        return gradients

    monkeypatch.setattr(backward, "backward", skewed)
    (verdict,) = verify(torch.device(device), SOME[:1])
    assert [name for name, found in verdict.found.items() if not found.ok] == [("dq", "dk", "dv")[wrong]]
