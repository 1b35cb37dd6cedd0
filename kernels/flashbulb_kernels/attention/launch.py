"""What the launchers of the attention kernels share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def launch_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one for a launch; on the CPU, make the interpreter fit for bf16."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    from .interpreter import mend_bf16

    mend_bf16()
    return nullcontext()


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Return the strides of [b, h, n, d] without the last, which is 1."""
    assert tensor.stride(3) == 1, tensor.stride()
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def aligned_rows(tensor: Tensor) -> Tensor:
    """Return the tensor as it is where its rows are dense, else a copy."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def mask_arguments(key_padding_mask: Tensor | None) -> tuple[Tensor | None, int]:
    """Return the mask as bytes with dense rows, and its stride over the batch."""
    if key_padding_mask is None:
        return None, 0
    dense = key_padding_mask if key_padding_mask.stride(1) == 1 else key_padding_mask.contiguous()
    return dense.view(torch.uint8), dense.stride(0)


def precision(dtype: torch.dtype) -> str:
    """Return how tl.dot multiplies: fp32 as three tf32 products, which keeps fp32's accuracy on tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
