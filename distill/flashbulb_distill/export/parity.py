"""The parity gate: an exported component must compute what its torch module computes, or the export fails."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn


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
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def check_component(
    component: str, path: Path, module: nn.Module, cases: list[Mapping[str, Tensor]], tolerance: float
) -> Parity:
    """Compare a graph with its module on several inputs, of different batch sizes among them.

    Raises:
        ParityError: an output is not finite, or differs by more than `tolerance` of the reference's size.
    """
    session = open_session(path)
    worst = 0.0
    for case in cases:
        expected = module(*case.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        arrived = session.run(None, {name: value.numpy() for name, value in case.items()})
        for want, got in zip(expected, arrived, strict=True):
            reference = want.numpy()
            size = float(np.sqrt(np.mean(np.square(reference)))) or 1.0
            error = float(np.max(np.abs(reference - got))) / size
            worst = max(worst, error if np.isfinite(error) else float("inf"))
    if worst > tolerance:
        raise ParityError(
            f"{component}: expected ONNX Runtime within {tolerance:g} of torch, got {worst:g}; the bundle was not made"
        )
    return Parity(component, worst, tolerance)
