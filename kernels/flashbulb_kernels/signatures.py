"""Every kernel with the signature of its launches, and what a compiler without a GPU is given of it.

Data alone: neither Triton nor torch is imported, so that tables can be checked where neither is installed.
"""

import ast
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tiles import Tile, block_d

# How the table of tiles, Triton's signatures and torch name a dtype, and how tl.dot multiplies it.
PRECISIONS = {"fp16": "tf32", "bf16": "tf32", "fp32": "tf32x3"}
FOLDER = Path(__file__).parent / "attention"


@dataclass(frozen=True, slots=True)
class Entry:
    """A kernel and the types of its arguments.

    Args:
        file, function: where the kernel stands: a module of `attention`, and its name there.
        types: type of each run-time argument, in order; "*T" is a pointer to the elements.
        aligned: arguments that are multiples of 16 in every launch that is meant to be fast.
        fixed: compile-time arguments that are the entry's own.
    """

    file: str
    function: str
    types: Mapping[str, str]
    aligned: frozenset[str]
    fixed: Mapping[str, bool] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Name every argument, in order."""
        return tuple(argument.arg for argument in jitted(self.file)[self.function].args.args)

    def constants(self, dtype: str, head_dim: int, tile: Tile, **flags: object) -> dict[str, Any]:
        """Return the value of every compile-time argument.

        `flags` are those that the launch chooses: HAS_MASK, and for the entry "fused" NORM ("none", "rms", "layer"),
        SPLIT and HAS_ROPE. A pointer that they leave unused is None.
        """
        known: dict[str, Any] = {
            "D": head_dim,
            "BLOCK_D": block_d(head_dim),
            **tile.constants(head_dim),
            "HAS_MASK": False,
            "PRECISION": PRECISIONS[dtype],
            "NORM": "none",
            "SPLIT": False,
            "HAS_ROPE": False,
            **self.fixed,
        } | flags
        unused = {
            "p_mask": not known["HAS_MASK"],
            **dict.fromkeys(("p_q_weight", "p_k_weight"), known["NORM"] == "none"),
            **dict.fromkeys(("p_q_bias", "p_k_bias"), known["NORM"] != "layer"),
            **dict.fromkeys(("p_cos", "p_sin"), not known["HAS_ROPE"]),
            "p_dk": known.get("GIVES_DK") is False,
            "p_dv": known.get("GIVES_DV") is False,
        }
        values = {name: known[name] for name in self.arguments if name not in self.types}
        return values | {name: None for name in self.types if unused.get(name)}

    def signature(self, dtype: str, constants: Mapping[str, Any]) -> dict[str, str]:
        """Return Triton's signature: the type of every argument, in order."""
        return {
            name: "constexpr" if name in constants else self.types[name].replace("*T", f"*{dtype}")
            for name in self.arguments
        }

    @property
    def source(self) -> str:
        """Return the kernel and every jitted function that it reaches, as a compiler sees them."""
        return _source(self.file, self.function)


def _strides(*tensors: str) -> tuple[str, ...]:
    return tuple(f"stride_{tensor}{axis}" for tensor in tensors for axis in "bhn")


_QKV = _strides("q", "k", "v")
_SIZES = {"scale": "fp32", "H": "i32", "NQ": "i32", "NK": "i32"}


def _entry(
    file: str,
    function: str,
    pointers: Mapping[str, str],
    strides: tuple[str, ...],
    sizes: Mapping[str, str],
    **fixed: bool,
) -> Entry:
    # A mask is bytes of any batch stride, and lse and delta lie row by row: those are read along n, in small numbers.
    return Entry(
        file=file,
        function=function,
        types={**pointers, **dict.fromkeys(strides, "i32"), **sizes},
        aligned=frozenset(pointers) - {"p_mask"} | frozenset(strides),
        fixed=fixed,
    )


def _dkdv(**gives: bool) -> Entry:
    return _entry(
        "dkdv", "dkdv_kernel",
        {
            "p_q": "*T", "p_k": "*T", "p_v": "*T", "p_mask": "*u8", "p_do": "*T",
            "p_lse": "*fp32", "p_delta": "*fp32", "p_dk": "*T", "p_dv": "*T",
        },
        (*_QKV, *_strides("do", "dk", "dv")),
        {"stride_mb": "i32"} | _SIZES,
        **gives,
    )  # fmt: skip


ENTRIES: dict[str, Entry] = {
    "forward": _entry(
        "forward", "forward_kernel",
        {"p_q": "*T", "p_k": "*T", "p_v": "*T", "p_mask": "*u8", "p_o": "*T", "p_lse": "*fp32"},
        (*_QKV, *_strides("o")),
        {"stride_mb": "i32"} | _SIZES,
    ),
    "fused": _entry(
        "fused", "fused_kernel",
        {
            "p_q": "*T", "p_k": "*T", "p_v": "*T", "p_mask": "*u8",
            **dict.fromkeys(("p_q_weight", "p_q_bias", "p_k_weight", "p_k_bias", "p_cos", "p_sin"), "*fp32"),
            "p_o": "*T", "p_lse": "*fp32",
        },
        (*_QKV, *_strides("o")),
        {"stride_mb": "i32", "scale": "fp32", "eps": "fp32", "split": "i32", "rope_start": "i32"} | _SIZES,
    ),
    "delta": _entry(
        "delta", "delta_kernel",
        {"p_o": "*T", "p_do": "*T", "p_dlse": "*fp32", "p_delta": "*fp32"},
        _strides("o", "do"),
        {"H": "i32", "NQ": "i32"},
    ),
    "dkdv": _dkdv(GIVES_DK=True, GIVES_DV=True),
    "dk": _dkdv(GIVES_DK=True, GIVES_DV=False),
    "dv": _dkdv(GIVES_DK=False, GIVES_DV=True),
    "dq": _entry(
        "dq", "dq_kernel",
        {
            "p_q": "*T", "p_k": "*T", "p_v": "*T", "p_mask": "*u8", "p_do": "*T",
            "p_lse": "*fp32", "p_delta": "*fp32", "p_dq": "*T",
        },
        (*_QKV, *_strides("do", "dq")),
        {"stride_mb": "i32"} | _SIZES,
    ),
    "tensorrt": Entry(
        file="tensorrt",
        function="tensorrt_kernel",
        types={"p_q": "*T", "p_k": "*T", "p_v": "*T", "NQ": "i32", "NK": "i32", "p_o": "*T"},
        aligned=frozenset(("p_q", "p_k", "p_v", "p_o")),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ what a compiler sees


@functools.cache
def jitted(file: str) -> dict[str, ast.FunctionDef]:
    """Return the functions under `triton.jit` of a module of `attention`, without docstrings."""
    return jitted_functions((FOLDER / f"{file}.py").read_text(encoding="utf-8"))


def jitted_functions(text: str) -> dict[str, ast.FunctionDef]:
    """Return the functions under `triton.jit` of a text, by name, without docstrings."""
    functions = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(m) for m in node.decorator_list):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            functions[node.name] = node
    return functions


@functools.cache
def _source(file: str, function: str) -> str:
    """Return a jitted function and those that it names, here or in the modules that its file imports from."""
    found: dict[str, str] = {}
    waiting = [(file, function)]
    while waiting:
        file, function = waiting.pop()
        node = jitted(file)[function]
        found[f"{file}.{function}"] = ast.unparse(node)
        home = dict.fromkeys(jitted(file), file) | _imported(file)
        named = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} & home.keys()
        waiting += [(home[name], name) for name in named if f"{home[name]}.{name}" not in found]
    return "\n".join(sorted(found.values()))


@functools.cache
def _imported(file: str) -> dict[str, str]:
    """Return the jitted functions that a module imports from its neighbours, with the module of each."""
    tree = ast.parse((FOLDER / f"{file}.py").read_text(encoding="utf-8"))
    return {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names
        if alias.name in jitted(node.module)
    }
