"""Logged scalars for TensorBoard, beside metrics.jsonl."""

from pathlib import Path
from typing import Any


class Board:
    """Writes each stage's scalars under `folder`/<stage>, where `tensorboard --logdir` finds them.

    Steps that come again, after a resume or when the guard went back, replace those of before.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "--tensorboard: expected the package tensorboard, it is not installed; "
                "run: pip install 'flashbulb[tensorboard]'"
            ) from error
        self._open = SummaryWriter
        self._folder = folder
        self._writers: dict[str, tuple[Any, int]] = {}

    def write(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Write scalars of a step, and let them be seen."""
        writer, last = self._writers.get(stage, (None, step))
        if writer is None or step <= last:
            if writer is not None:
                writer.close()
            writer = self._open(str(self._folder / stage), purge_step=step)
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()
        self._writers[stage] = writer, step

    def close(self) -> None:
        """End all files."""
        for writer, _ in self._writers.values():
            writer.close()
