"""Which steps of a few-step student are shown while it draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashbulb_service.jobs import Job
from flashbulb_service.tasks import ImageTask


@dataclass(frozen=True)
class Estimate:
    """What a row's picture looks like after a step: the decoder's view of the student's clean latents."""

    job: Job
    task: ImageTask
    index: int  # which preview of the row, from 0
    step: int  # steps done
    num_steps: int
    pixels: np.ndarray  # uint8 [h, w, 3]


def preview_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """Return the steps (done, from 1) after which to show an estimate: evenly spread, never the last one."""
    count = min(count, num_steps - 1)
    return tuple(number * num_steps // (count + 1) for number in range(1, count + 1))


def due_previews(rows: Sequence[tuple[Job, ImageTask]], step: int, num_steps: int) -> list[tuple[int, int]]:
    """Return (row, index of its preview) for the rows that want to be shown after `step` steps."""
    due = []
    for row, (_, task) in enumerate(rows):
        steps = preview_steps(num_steps, task.partial_images)
        if step in steps:
            due.append((row, steps.index(step)))
    return due
