"""Every kernel with the signature of its launches: what a compiler without a GPU needs to know.

Importing it imports Triton. To compile, TRITON_INTERPRET must not be set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .forward import forward_kernel
from .launch import block_d

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

        `flags` are those that the launch chooses, like HAS_MASK; a mask pointer that is not used is None.
        """
        known: dict[str, Any] = {
            "D": head_dim,
            "BLOCK_D": block_d(head_dim),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "HAS_MASK": False,
            "PRECISION": PRECISIONS[dtype],
        } | flags
        values = {name: known[name] for name in self.kernel.arg_names if name not in self.types}
        if not known["HAS_MASK"] and "p_mask" in self.types:
            values["p_mask"] = None
        return values

    def signature(self, dtype: str, constants: Mapping[str, Any]) -> dict[str, str]:
        """Return Triton's signature: the type of every argument, in order."""
        return {
            name: "constexpr" if name in constants else self.types[name].replace("*T", f"*{dtype}")
            for name in self.kernel.arg_names
        }


def _strides(*tensors: str) -> tuple[str, ...]:
    return tuple(f"stride_{tensor}{axis}" for tensor in tensors for axis in "bhn")


def _types(pointers: Mapping[str, str], strides: tuple[str, ...], sizes: tuple[str, ...]) -> dict[str, str]:
    numbers = dict.fromkeys((*strides, "stride_mb"), "i32") | {"scale": "fp32"} | dict.fromkeys(sizes, "i32")
    return {**pointers, **numbers}


_QKVO = _strides("q", "k", "v", "o")

ENTRIES: dict[str, Entry] = {
    "forward": Entry(
        kernel=forward_kernel,
        types=_types(
            {"p_q": "*T", "p_k": "*T", "p_v": "*T", "p_mask": "*u8", "p_o": "*T", "p_lse": "*fp32"},
            _QKVO,
            ("H", "NQ", "NK"),
        ),
        aligned=frozenset({"p_q", "p_k", "p_v", "p_o", "p_lse", *_QKVO}),
    ),
}
