"""The parity gate: an exported component must compute what its torch module computes, or the export fails."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..bundle import DISABLED_OPTIMIZERS

# A graph may differ from torch by this many times torch's own rounding error, as measured: two runtimes that sum in
# different orders differ by one to three times that error; a wrong weight, layout or scale by orders of magnitude.
MARGIN = 8.0

TEXT_OUTPUTS = ("prompt_embeds", "pooled_prompt_embeds")

Case = Mapping[str, Tensor]


class ParityError(ValueError):
    """Say which component drifted, by how much, and what was allowed."""


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest difference of a component, relative to the root mean square of the reference's output."""

    component: str
    error: float
    tolerance: float


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Open a graph on one CPU thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=[*DISABLED_OPTIMIZERS]
    )


@torch.no_grad()
def check_component(
    component: str, path: Path, module: nn.Module, cases: Sequence[Case], tolerance: float | None = None
) -> Parity:
    """Compare a graph with its module on several inputs, of different batch sizes among them.

    Args:
        tolerance: relative to the reference's size; None derives it from the reference's own rounding error.
    Raises:
        ParityError: an output is not finite, or differs by more than the tolerance.
    """
    session = open_session(path)
    allowed = derive_tolerance(module, cases) if tolerance is None else tolerance
    worst = 0.0
    for case in cases:
        arrived = session.run(None, {name: value.numpy() for name, value in case.items()})
        worst = max(worst, _difference(_outputs(module, case), arrived))
    if not worst <= allowed:
        raise ParityError(
            f"{component}: expected ONNX Runtime within {allowed:.3g} of torch, got {worst:.3g}; "
            "the graph does not compute what its weights do in torch"
        )
    return Parity(component, worst, allowed)


def check_padding(path: Path, inputs: Mapping[str, Tensor], tolerance: float) -> None:
    """Hold a text encoder to what a manifest calls padding "zeros": each prompt run on its own ids alone.

    Args:
        inputs: input_ids and attention_mask [b, l], padded.
        tolerance: relative to each output's root mean square.
    Raises:
        ParityError: what padding becomes is not zeros, or other outputs depend on it.
    """
    session = open_session(path)
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    embeds, pooled = session.run(TEXT_OUTPUTS, {"input_ids": ids, "attention_mask": mask})
    for row, length in enumerate(mask.sum(1)):
        one = slice(row, row + 1)
        feed = {"input_ids": ids[one, :length], "attention_mask": mask[one, :length]}
        cut, cut_pooled = session.run(TEXT_OUTPUTS, feed)
        cut = np.pad(cut, ((0, 0), (0, ids.shape[1] - length), (0, 0)))
        error = _difference([embeds[one], pooled[one]], [cut, cut_pooled])
        if np.any(embeds[one, length:]) or not error <= tolerance:
            raise ParityError(
                f"text_encoder: expected zeros for padding and all else within {tolerance:.3g} without it, got "
                f"{error:.3g}; this encoder needs its padding"
            )


@torch.no_grad()
def derive_tolerance(module: nn.Module, cases: Sequence[Case]) -> float:
    """Return `MARGIN` times the module's own rounding error: float32 against float64, 16-bit floats against float32.

    Each tensor is converted and back, which loses nothing; for a while the weights take two to three times the memory.

    Raises:
        ParityError: the module itself overflows in its dtype.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    dtypes = {name: tensor.dtype for name, tensor in _tensors(module)}  # T5 in float16 keeps some in float32
    rounded = [_outputs(module, case) for case in cases]
    module.to(torch.float64 if dtype == torch.float32 else torch.float32)
    try:
        exact = [_outputs(module, case) for case in cases]
    finally:
        for name, tensor in _tensors(module):
            tensor.data = tensor.data.to(dtypes[name])
    own = max(_difference(true, [*near]) for true, near in zip(exact, rounded, strict=True))
    if not np.isfinite(own):
        raise ParityError(
            f"{type(module).__name__}: expected finite outputs in {dtype}, got others: the network overflows there; "
            "export it in bfloat16 or float32"
        )
    return MARGIN * max(own, float(torch.finfo(torch.float32).eps))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [  # shared ones under all their names: conversion makes several of one
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _outputs(module: nn.Module, case: Case) -> list[NDArray[np.float32]]:
    outputs = module(*case.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [output.float().numpy() for output in outputs]


def _difference(expected: list[NDArray[np.float32]], arrived: list[NDArray[np.float32]]) -> float:
    """Return the largest difference, relative to each expected output's root mean square; inf where not finite."""
    worst = 0.0
    for reference, got in zip(expected, arrived, strict=True):
        if reference.shape != got.shape:
            return float("inf")
        if not reference.size:  # a family without pooled embeddings has them of width 0
            continue
        size = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64)))) or 1.0
        error = float(np.max(np.abs(reference - got), initial=0.0)) / size
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst
