"""The course on the mixture: what all entries have in common, and what a student's points are worth."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..evaluate.metrics import frechet_distance, manifold
from ..teachers.mixture import MixtureDenoiser, ring

Points = NDArray[np.float64]
NEIGHBOURS_OF = 1500  # points whose neighbours are searched, which costs the square


@dataclass(frozen=True)
class Course:
    """Teacher, budget and learning rates, the same for every entry.

    Args:
        num_modes, std: of the teacher's Gaussians, evenly on a circle of radius 2.
        width: of the student's hidden layers.
        moves: updates of the student, shared equally by an entry's stages.
        warmup: steps before the first of them in each adversarial stage.
        start_steps: of the denoising that makes the start.   num_samples: points that are judged.
        rate: of the student.   heads_rate, fake_rate: of heads and fake score.
        delta_t: ADM's step.   gan_weight: of DMD2's GAN term.
    """

    num_modes: int = 8
    std: float = 0.2
    width: int = 128
    moves: int = 1000
    warmup: int = 200
    batch_size: int = 128
    num_pairs: int = 4096
    start_steps: int = 1500
    num_samples: int = 4096
    rate: float = 5e-4
    heads_rate: float = 3e-3
    fake_rate: float = 1e-3
    delta_t: float = 1 / 64
    gan_weight: float = 0.1
    ema: float = 0.99

    def teacher(self) -> MixtureDenoiser:
        """Return the teacher, whose score is exact."""
        return MixtureDenoiser(ring(self.num_modes), self.std)


@dataclass(frozen=True)
class Figures:
    """What points are worth.

    modes: of the teacher's, those with a quarter of their share or more, counting points within 3 std of a centre.
    misplaced: total variation between the shares of the modes and equal ones, what is off them included; 0 to 1.
    off: share of points further out than 3 std of every centre; 1.1 % of exact samples are.
    frechet: distance of the fitted Gaussians.   precision, recall: by 3 nearest neighbours.
    """

    modes: int
    misplaced: float
    off: float
    frechet: float
    precision: float
    recall: float


COLUMNS = {
    "modes": "modes",
    "misplaced": "misplaced mass",
    "off": "off every mode",
    "frechet": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
}


def judge_points(points: Points, real: Points, course: Course) -> Figures:
    """Measure points [n, 2] against as many exact samples of the teacher."""
    centres = ring(course.num_modes).double().numpy()
    gaps = np.linalg.norm(points[:, None] - centres[None], axis=2)
    nearest, inside = gaps.argmin(1), gaps.min(1) <= 3 * course.std
    shares = np.bincount(nearest[inside], minlength=course.num_modes) / len(points)
    off = float(1 - inside.mean())
    shape = manifold(real[:NEIGHBOURS_OF], points[:NEIGHBOURS_OF])
    return Figures(
        modes=int((shares >= 0.25 / course.num_modes).sum()),
        misplaced=float((np.abs(shares - 1 / course.num_modes).sum() + off) / 2),
        off=off,
        frechet=frechet_distance(real, points),
        precision=shape.precision,
        recall=shape.recall,
    )
