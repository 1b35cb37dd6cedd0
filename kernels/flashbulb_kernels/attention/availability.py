"""Where the Triton kernels can run, and why not elsewhere."""

from importlib.util import find_spec

import torch

from ..tiles import HEAD_DIMS, backward_entries, has_tile

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
LOWEST_CAPABILITY = (8, 0)  # asynchronous copies and bf16 begin there


def why_not_triton(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, fused: bool = False, training: bool = False
) -> str | None:
    """Say why the kernels cannot run, in one line; None where they can.

    Args:
        fused: q and k are prepared in the kernel.   training: gradients are needed.
    """
    if dtype not in DTYPES:
        return f"expected fp16, bf16 or fp32, got {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"expected a head dimension of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'flashbulb[kernels]'"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LOWEST_CAPABILITY:
            return f"expected a GPU of compute capability 8.0 or higher, got {capability[0]}.{capability[1]}"
        cell = DTYPES[dtype], head_dim, arch_of(device)
        entries = ("fused" if fused else "forward", *(backward_entries(*cell) if training else ()))
        missing = [entry for entry in entries if not has_tile(entry, *cell)]
        if missing:
            return f"there is no {missing[0]} kernel for {DTYPES[dtype]} and a head dimension of {head_dim} on this GPU"
        return None
    if device.type == "cpu":
        return None if interpreted() else "the tensors are on the CPU, and TRITON_INTERPRET=1 is not set"
    return f"expected tensors on a CUDA device, got {device.type}"


def interpreted() -> bool:
    """Say whether the kernels run on Triton's interpreter in this process."""
    from triton.runtime.interpreter import InterpretedFunction

    from .forward import forward_kernel

    return isinstance(forward_kernel, InterpretedFunction)


def arch_of(device: torch.device) -> str:
    """Name the device's architecture as the table of tiles does: sm_90, or "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
