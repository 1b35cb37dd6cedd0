"""How long a batch takes: tau(b) = max(floor, base + row * b) milliseconds, fitted from what was measured.

The shape is that of a device which is launch-bound for small batches and compute-bound for large ones. A fit
starts from the calibration in the bundle's manifest and follows the batches that the worker runs.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_MARGIN = 1.2  # until enough batches were measured: predicted times are multiplied by this
MIN_MARGIN, MAX_MARGIN = 1.0, 1.5  # a device without noise pays nothing
MARGIN_SAMPLES = 20
KNEE_SHARE = 0.98  # of the best throughput; below it, a saturated worker would lose what batching gains
WINDOW_PER_SIZE = 32  # batches remembered of each size
WINDOW_RATIOS = 200
REFIT_EVERY = 8


@dataclass(frozen=True, slots=True)
class Tau:
    """Predicted time of a batch, in milliseconds, by its number of rows."""

    floor_ms: float
    base_ms: float
    row_ms: float
    margin: float = DEFAULT_MARGIN  # predicted times are trusted only when multiplied by this

    def __post_init__(self) -> None:
        if not (self.floor_ms >= 0 and self.row_ms >= 0 and math.isfinite(self.base_ms)):
            raise ValueError(f"expected a time that does not fall with the batch, got {self}")

    def __call__(self, num_rows: int) -> float:
        """Predict the time of a batch of num_rows."""
        return max(self.floor_ms, self.base_ms + self.row_ms * num_rows)

    def safe(self, num_rows: int) -> float:
        """Predict a time that nearly every batch of num_rows stays below."""
        return self.margin * self(num_rows)

    def throughput(self, num_rows: int) -> float:
        """Return rows per millisecond at this batch size."""
        return num_rows / max(self(num_rows), 1e-9)

    def knee(self, limit: int, share: float = KNEE_SHARE) -> int:
        """Return the smallest batch, of at most `limit`, that reaches `share` of the best throughput there."""
        best = max(self.throughput(size) for size in range(1, limit + 1))
        return next(size for size in range(1, limit + 1) if self.throughput(size) >= share * best)


def fit_tau(points: Mapping[int, float], *, margin: float = DEFAULT_MARGIN) -> Tau:
    """Fit tau to batch size -> milliseconds.

    Every split of the sizes into a flat part and a rising line is tried; the one with the smallest squared
    relative error wins. One size alone says nothing of the slope: then rows are taken to cost the same each,
    and smaller batches as much as the one measured, so that nobody is promised a speed never seen.

    Raises:
        ValueError: there is no point, or one that is not a positive time.
    """
    sizes = sorted(points)
    if not sizes or any(
        size < 1 or not points[size] > 0 or not math.isfinite(points[size]) for size in sizes
    ):
        raise ValueError(f"expected batch sizes with positive milliseconds, got {dict(points)}")
    if len(sizes) == 1:
        ms = points[sizes[0]]
        return Tau(ms, 0.0, ms / sizes[0], margin)
    fits = [_fit_split(points, sizes, num_flat, margin) for num_flat in range(len(sizes) - 1)]
    return min(fits, key=lambda tau: sum((tau(size) / points[size] - 1) ** 2 for size in sizes))


def _fit_split(points: Mapping[int, float], sizes: list[int], num_flat: int, margin: float) -> Tau:
    """Fit a floor to the first sizes and a line (weighted by 1 / ms²: relative error) to the others."""
    flat, rising = sizes[:num_flat], sizes[num_flat:]
    weights = [1 / points[size] ** 2 for size in rising]
    total = sum(weights)
    mean_b = sum(w * b for w, b in zip(weights, rising, strict=True)) / total
    mean_ms = sum(w * points[b] for w, b in zip(weights, rising, strict=True)) / total
    spread = sum(w * (b - mean_b) ** 2 for w, b in zip(weights, rising, strict=True))
    slope = (
        sum(w * (b - mean_b) * (points[b] - mean_ms) for w, b in zip(weights, rising, strict=True)) / spread
    )
    slope = max(0.0, slope)
    base = mean_ms - slope * mean_b
    floor = statistics.fmean(points[size] for size in flat) if flat else 0.0
    if (
        base + slope <= 0
    ):  # the line of noisy times may fall below nothing at few rows, and no batch takes that
        floor = max(floor, min(points.values()))
    return Tau(floor, base, slope, margin)


class TimeModel:
    """The time of one bucket's batches on this worker: calibration first, then what is measured.

    Measurements are remembered in bounded windows and enter as medians by batch size, so that a single slow
    batch (a page fault, another process) moves nothing.
    """

    def __init__(self, calibration: Mapping[int, float] | None = None) -> None:
        """Start from batch size -> milliseconds of the manifest, or from nothing."""
        self._calibration = dict(calibration or {})
        self._measured: dict[int, deque[float]] = {}
        self._ratios: deque[float] = deque(maxlen=WINDOW_RATIOS)  # measured / predicted
        self._drifts: deque[float] = deque(maxlen=WINDOW_RATIOS)  # measured / calibrated
        self._start = fit_tau(self._calibration) if self._calibration else None
        self.tau: Tau | None = self._start
        self._since_fit = 0

    @property
    def drift(self) -> float:
        """Return measured over calibrated time (median); 1.0 while nothing was measured or calibrated."""
        return statistics.median(self._drifts) if self._drifts else 1.0

    def observe(self, num_rows: int, ms: float) -> bool:
        """Learn from a batch that ran; tell whether `tau` was fitted anew."""
        if self.tau is not None:
            self._ratios.append(ms / self.tau(num_rows))
        if self._start is not None:
            self._drifts.append(ms / self._start(num_rows))
        window = self._measured.setdefault(num_rows, deque(maxlen=WINDOW_PER_SIZE))
        window.append(ms)
        self._since_fit += 1
        if self.tau is not None and self._since_fit < REFIT_EVERY and len(window) > 1:
            return False
        self._since_fit = 0
        self.tau = fit_tau(self._points(), margin=self._margin())
        return True

    def _points(self) -> dict[int, float]:
        """Take measured medians, and the calibration, scaled by the drift, for sizes that did not occur."""
        scaled = {size: ms * self.drift for size, ms in self._calibration.items()}
        return scaled | {size: statistics.median(window) for size, window in self._measured.items()}

    def _margin(self) -> float:
        """Return what 95 % of the batches stayed below, as a multiple of their prediction."""
        if len(self._ratios) < MARGIN_SAMPLES:
            return DEFAULT_MARGIN
        ordered = sorted(self._ratios)
        return min(max(ordered[math.ceil(0.95 * len(ordered)) - 1], MIN_MARGIN), MAX_MARGIN)


class LearnedCap:
    """The largest batch that fits the device's memory, as far as failures have told."""

    RECOVERY = 64  # batches at the cap that must pass before one more row is tried

    def __init__(self, limit: int) -> None:
        """Start from what the bundle and the operator allow."""
        self._limit = limit
        self._passed = 0
        self.rows = limit

    def out_of_memory(self, num_rows: int) -> None:
        """Learn that a batch of num_rows did not fit."""
        self.rows = max(1, min(self.rows, num_rows // 2))
        self._passed = 0

    def passed(self, num_rows: int) -> None:
        """Learn that a batch of num_rows did fit; slowly try larger ones again."""
        if num_rows >= self.rows < self._limit:
            self._passed += 1
            if self._passed >= self.RECOVERY:
                self._passed, self.rows = 0, self.rows + 1
