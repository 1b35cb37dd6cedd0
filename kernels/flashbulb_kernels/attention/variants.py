"""Every kernel with the signature of its launches: what a compiler without a GPU needs to know.

Importing it imports Triton. To compile, TRITON_INTERPRET must not be set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .backward import delta_kernel, dkdv_kernel, dq_kernel
from .forward import forward_kernel
from .fused import fused_kernel
from .launch import block_d
from .tensorrt import tensorrt_kernel

# How the table of tiles, Triton's signatures and torch name a dtype, and how tl.dot multiplies it.
PRECISIONS = {"fp16": "tf32", "bf16": "tf32", "fp32": "tf32x3"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A kernel and the types of its arguments.

    Args:
        kernel: the function under `triton.jit`.
        types: type of each run-time argument, in order; "*T" is a pointer to the elements.
        aligned: arguments that are multiples of 16 in every launch that is meant to be fast.
    """

    kernel: Any
    types: Mapping[str, str]
    aligned: frozenset[str]

    def constants(
        self, dtype: str, head_dim: int, block_m: int, block_n: int, **flags: object
    ) -> dict[str, Any]:
        """Return the value of every compile-time argument.

        `flags` are those that the launch chooses: HAS_MASK, and for the entry "fused" NORM ("none", "rms", "layer"),
        SPLIT and HAS_ROPE. A pointer that they leave unused is None.
        """
        known: dict[str, Any] = {
            "D": head_dim,
            "BLOCK_D": block_d(head_dim),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "RELOAD": False,
            "HAS_MASK": False,
            "PRECISION": PRECISIONS[dtype],
            "NORM": "none",
            "SPLIT": False,
            "HAS_ROPE": False,
        } | flags
        unused = {
            "p_mask": not known["HAS_MASK"],
            **dict.fromkeys(("p_q_weight", "p_k_weight"), known["NORM"] == "none"),
            **dict.fromkeys(("p_q_bias", "p_k_bias"), known["NORM"] != "layer"),
            **dict.fromkeys(("p_cos", "p_sin"), not known["HAS_ROPE"]),
        }
        values = {name: known[name] for name in self.kernel.arg_names if name not in self.types}
        return values | {name: None for name in self.types if unused.get(name)}

    def signature(self, dtype: str, constants: Mapping[str, Any]) -> dict[str, str]:
        """Return Triton's signature: the type of every argument, in order."""
        return {
            name: "constexpr" if name in constants else self.types[name].replace("*T", f"*{dtype}")
            for name in self.kernel.arg_names
        }


def _strides(*tensors: str) -> tuple[str, ...]:
    return tuple(f"stride_{tensor}{axis}" for tensor in tensors for axis in "bhn")


_QKV = _strides("q", "k", "v")
_SIZES = {"scale": "fp32", "H": "i32", "NQ": "i32", "NK": "i32"}


def _entry(
    kernel: Any, pointers: Mapping[str, str], strides: tuple[str, ...], sizes: Mapping[str, str]
) -> Entry:
    # A mask is bytes of any batch stride, and lse and delta lie row by row: those are read along n, in small numbers.
    return Entry(
        kernel=kernel,
        types={**pointers, **dict.fromkeys(strides, "i32"), **sizes},
        aligned=frozenset(pointers) - {"p_mask"} | frozenset(strides),
    )


ENTRIES: dict[str, Entry] = {
    "forward": _entry(
        forward_kernel,
        {"p_q": "*T", "p_k": "*T", "p_v": "*T", "p_mask": "*u8", "p_o": "*T", "p_lse": "*fp32"},
        (*_QKV, *_strides("o")),
        {"stride_mb": "i32"} | _SIZES,
    ),
    "fused": _entry(
        fused_kernel,
        {
            "p_q": "*T", "p_k": "*T", "p_v": "*T", "p_mask": "*u8",
            **dict.fromkeys(("p_q_weight", "p_q_bias", "p_k_weight", "p_k_bias", "p_cos", "p_sin"), "*fp32"),
            "p_o": "*T", "p_lse": "*fp32",
        },
        (*_QKV, *_strides("o")),
        {"stride_mb": "i32", "scale": "fp32", "eps": "fp32", "split": "i32", "rope_start": "i32"} | _SIZES,
    ),
    "delta": _entry(
        delta_kernel,
        {"p_o": "*T", "p_do": "*T", "p_dlse": "*fp32", "p_delta": "*fp32"},
        _strides("o", "do"),
        {"H": "i32", "NQ": "i32"},
    ),
    "dkdv": _entry(
        dkdv_kernel,
        {
            "p_q": "*T", "p_k": "*T", "p_v": "*T", "p_mask": "*u8", "p_do": "*T",
            "p_lse": "*fp32", "p_delta": "*fp32", "p_dk": "*T", "p_dv": "*T",
        },
        (*_QKV, *_strides("do", "dk", "dv")),
        {"stride_mb": "i32"} | _SIZES,
    ),
    "dq": _entry(
        dq_kernel,
        {
            "p_q": "*T", "p_k": "*T", "p_v": "*T", "p_mask": "*u8", "p_do": "*T",
            "p_lse": "*fp32", "p_delta": "*fp32", "p_dq": "*T",
        },
        (*_QKV, *_strides("do", "dq")),
        {"stride_mb": "i32"} | _SIZES,
    ),
    "tensorrt": Entry(
        kernel=tensorrt_kernel,
        types={"p_q": "*T", "p_k": "*T", "p_v": "*T", "NQ": "i32", "NK": "i32", "p_o": "*T"},
        aligned=frozenset(("p_q", "p_k", "p_v", "p_o")),
    ),
}  # fmt: skip
