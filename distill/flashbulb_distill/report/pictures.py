"""Draw the report's pictures: teacher, last student and its average, by prompt, seed and number of steps."""

import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..export.generate import Generate
from ..train.probe import compare_samples

LARGEST_PX = 320  # side of a picture in the page
FRAMES = 4  # of a clip


@dataclass(frozen=True)
class Drawn:
    """One model's pictures uint8 [prompts, seeds, h, w, 3] (clips: [prompts, seeds, f, h, w, 3])."""

    name: str
    steps: int
    images: NDArray[np.uint8]
    seconds: float  # of one picture, the median

    def compare(self, teacher: "Drawn") -> dict[str, float]:
        """Return contrast, diversity and colour drift beside the teacher's pictures."""
        ours, theirs = (torch.from_numpy(x.images).float().movedim(-1, 2) for x in (self, teacher))
        return compare_samples(ours, theirs)


@dataclass(frozen=True)
class Model:
    """What draws, and in how many steps; `load` is called when its turn comes, and the network dropped after it."""

    name: str
    steps: int
    load: Callable[[], Generate]


def draw(
    models: Sequence[Model],
    prompts: Sequence[str],
    seeds: Sequence[int],
    progress: Callable[[int, int], None],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Drawn]:
    """Draw every prompt with every seed by each model, one picture at a time: large decoders have no room for more."""
    drawn = []
    for index, model in enumerate(models):
        generate = model.load()
        images, seconds = [], []
        for number, prompt in enumerate(prompts):
            row = []
            for seed in seeds:
                start = clock()
                row.append(generate([prompt], [seed])[0])
                seconds.append(clock() - start)
            images.append(row)
            progress(index * len(prompts) + number + 1, len(models) * len(prompts))
        del generate  # before the next one is loaded
        drawn.append(Drawn(model.name, model.steps, np.array(images), float(np.median(seconds))))
    return drawn


def fewer_steps(time_steps: tuple[float, ...]) -> list[tuple[float, ...]]:
    """Return the student's own steps, and every second, fourth ... of them."""
    schedules = [time_steps]
    while len(schedules[-1]) > 1:
        schedules.append(schedules[-1][::2])
    return schedules


def data_uri(image: NDArray[np.uint8]) -> str:
    """Return a picture [h, w, 3], or a few frames of a clip [f, h, w, 3] side by side, as a data URI."""
    if image.ndim == 4:
        chosen = np.linspace(0, len(image) - 1, min(FRAMES, len(image))).round().astype(int)
        image = np.concatenate(list(image[chosen]), axis=1)
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    if picture.height > LARGEST_PX:
        picture.thumbnail((LARGEST_PX * FRAMES, LARGEST_PX))
        picture.save(buffer, "WEBP", quality=85)
        kind = "webp"
    else:
        picture.save(buffer, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
