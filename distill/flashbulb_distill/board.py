"""Logged scalars for TensorBoard, beside metrics.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import UsageError


class Board:
    """Writes each stage's scalars under `folder`/<stage>, where `tensorboard --logdir` finds them.

    Steps that come again, after a resume or when the guard went back, replace those of before.

    Raises:
        UsageError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard: expected the package tensorboard, it is not installed; "
                "run: pip install 'flashbulb[tensorboard]'"
            ) from error
        self._open = SummaryWriter
        self._folder = folder
        self._writers: dict[str, tuple[Any, int]] = {}

    def write(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Write scalars of a step, and let them be seen."""
        writer = self._writer(stage, step, again=True)
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()
        self._writers[stage] = writer, step

    def picture(self, stage: str, step: int, path: Path) -> None:
        """Write a picture of a step."""
        writer = self._writer(stage, step, again=False)
        with Image.open(path) as image:
            writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        writer.flush()

    def _writer(self, stage: str, step: int, *, again: bool) -> Any:
        """Return the stage's file; if the step came before, a new one that hides what others hold from it on."""
        writer, last = self._writers.get(stage, (None, -1))
        if writer is not None and not (again and step <= last):
            return writer
        if writer is not None:
            writer.close()
        writer = self._open(str(self._folder / stage), purge_step=step)
        self._writers[stage] = writer, -1
        return writer

    def close(self) -> None:
        """End all files."""
        for writer, _ in self._writers.values():
            writer.close()
