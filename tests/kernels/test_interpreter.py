"""Triton's interpreter and bf16: the faults that `interpreter.mend_bf16` mends, and that it mends them."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from flashbulb_kernels.attention.interpreter import _round_to_bf16

PROGRAM = """
import torch, triton, triton.language as tl
@triton.jit
def product(p_a, p_b, p_c, p_rounded):
    o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    c = tl.dot(tl.load(p_a + o), tl.load(p_b + o))
    tl.store(p_c + o, c)
    tl.store(p_rounded + o, c.to(tl.bfloat16))
if {mended}:
    from flashbulb_kernels.attention.interpreter import mend_bf16
    mend_bf16()
torch.manual_seed(0)
a, b = torch.randn(2, 16, 16).to(torch.bfloat16)
c, rounded = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
product[(1,)](a, b, c, rounded)
print(torch.allclose(c, a.float() @ b.float(), atol=1e-5), torch.equal(rounded, c.to(torch.bfloat16)))
"""


@pytest.mark.parametrize(("mended", "told"), [(False, "False False"), (True, "True True")])
def test_bf16_is_wrong_without_the_mending_and_right_with_it(mended, told, tmp_path):
    """If the first case fails, Triton has mended itself, and `mend_bf16` can go."""
    program = tmp_path / "program.py"  # jit reads its function's source from a file
    program.write_text(PROGRAM.format(mended=mended))
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    answer = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.stdout.strip() == told, answer.stderr


def test_rounding_to_bf16_is_that_of_torch():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38])])
    expected = torch.from_numpy(values).to(torch.bfloat16)
    found = torch.from_numpy(_round_to_bf16(values).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
