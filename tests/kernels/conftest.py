"""The kernels' tests run on a GPU where TRITON_INTERPRET=0 and there is one, else on Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'flashbulb[kernels]'")


@pytest.fixture
def device() -> str:
    return "cpu" if triton.knobs.runtime.interpret else "cuda"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty hands out with NaN, so that an element no kernel has written cannot pass."""
    allocate = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(allocate[0](*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(allocate[1](*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(allocate[2](*a, **k)))
