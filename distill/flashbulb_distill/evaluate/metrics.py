"""Measures of generated pictures: pure NumPy functions of feature vectors and labels, in double precision.

Shapes: n samples with d features are [n, d]. "Real" and "generated" name the two sets where roles differ.
Which network made the features is the caller's business; numbers are comparable only for the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Strings = NDArray[np.str_]


# ---------------------------------------------------------------- distances between distributions


@dataclass(frozen=True)
class Projection:
    """An affine map onto principal components: `mean` [d], `components` [k, d] with orthonormal rows."""

    mean: Floats
    components: Floats

    def __call__(self, features: ArrayLike) -> Floats:
        """Project [n, d] to [n, k]."""
        return (_matrix(features) - self.mean) @ self.components.T


def fit_projection(features: ArrayLike, num_components: int) -> Projection:
    """Fit a projection onto the `num_components` directions of largest variance of features [n, d].

    Raises ValueError when n - 1 or d is smaller than `num_components`: the rest would be noise.
    """
    x = _matrix(features)
    available = min(len(x) - 1, x.shape[1])
    if not 1 <= num_components <= available:
        raise ValueError(
            f"{x.shape[0]} x {x.shape[1]} features have {available} components, {num_components} asked"
        )
    mean = x.mean(axis=0)
    _, _, directions = np.linalg.svd(x - mean, full_matrices=False)
    return Projection(mean, directions[:num_components])


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of the Gaussians fitted to [n, d] and [m, d].

    Dowson & Landau 1982; with Inception features it is the FID of Heusel et al. 2017. Both sets should hold
    several times more samples than dimensions, so project wide features first (`fit_projection`).
    """
    a, b = _pair(a, b)
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2): symmetric, so its eigenvalues are real and stable.
    root_a = _symmetric_root(cov_a)
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    distance = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.trace(cov_a) + np.trace(cov_b)
    return float(distance - 2 * np.sqrt(np.clip(cross, 0, None)).sum())


def kernel_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Return the unbiased squared maximum mean discrepancy of [n, d] and [m, d], kernel (x.y / d + 1)^3.

    The KID of Binkowski et al. 2018, on the full sets instead of subsets. Zero in expectation for equal
    distributions, so it may be slightly negative.
    """
    a, b = _pair(a, b)
    return float(
        _mean_off_diagonal(_cubic(a, a)) + _mean_off_diagonal(_cubic(b, b)) - 2 * _cubic(a, b).mean()
    )


class Manifold(NamedTuple):
    """How two sets cover each other, judged by balls around each sample that reach its k-th neighbour."""

    precision: float  # share of generated samples inside the union of the real balls
    recall: float  # share of real samples inside the union of the generated balls
    density: float  # mean number of real balls a generated sample lies in, over k; may exceed 1
    coverage: float  # share of real balls with a generated sample inside


def manifold(real: ArrayLike, generated: ArrayLike, k: int = 3) -> Manifold:
    """Return precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Raises ValueError when a set has no k-th neighbour.
    """
    real, generated = _pair(real, generated)
    if min(len(real), len(generated)) <= k:
        raise ValueError(
            f"the {k}-th neighbour needs more than {k} samples, got {len(real)} and {len(generated)}"
        )
    across = _distances(real, generated)
    in_real_ball = across <= _kth_neighbour_distance(real, k)[:, None]
    in_generated_ball = across <= _kth_neighbour_distance(generated, k)[None, :]
    return Manifold(
        precision=float(in_real_ball.any(axis=0).mean()),
        recall=float(in_generated_ball.any(axis=1).mean()),
        density=float(in_real_ball.sum(axis=0).mean() / k),
        coverage=float(in_real_ball.any(axis=1).mean()),
    )


# ---------------------------------------------------------------- does a picture show what was asked for?


def retrieval_hits(
    features: ArrayLike,
    concepts: Sequence[str] | Strings,
    reference_features: ArrayLike,
    reference_concepts: Sequence[str] | Strings,
    *,
    k: int = 1,
    own_index: Sequence[int] | None = None,
) -> Bools:
    """Return for each query whether one of the `k` nearest reference pictures (cosine) has its concept: [n].

    `features` [n, d] with their `concepts` [n]; the reference [m, d], [m]. `own_index` [n] names for each
    query one reference picture to leave out: itself, when the queries are taken from the reference.
    Raises ValueError when the reference has fewer than `k` pictures left.
    """
    similarity = _cosine(features, reference_features)
    left = similarity.shape[1] - (own_index is not None)
    if not 1 <= k <= left:
        raise ValueError(f"the {k} nearest of {left} reference pictures do not exist")
    if own_index is not None:
        similarity[np.arange(len(similarity)), np.asarray(own_index)] = -np.inf
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    found = np.asarray(reference_concepts)[nearest] == np.asarray(concepts)[:, None]
    return np.asarray(found.any(axis=1), dtype=np.bool_)


def nearest_styles(
    features: ArrayLike,
    concepts: Sequence[str] | Strings,
    reference_features: ArrayLike,
    reference_concepts: Sequence[str] | Strings,
    reference_styles: Sequence[str] | Strings,
) -> Strings:
    """Return the style of the nearest reference picture (cosine) *of the query's own concept*: [n].

    Raises ValueError when the reference lacks a concept.
    """
    same_concept = np.asarray(concepts)[:, None] == np.asarray(reference_concepts)[None, :]
    orphans = ~same_concept.any(axis=1)
    if orphans.any():
        raise ValueError(f"no reference picture shows {str(np.asarray(concepts)[orphans][0])!r}")
    similarity = np.where(same_concept, _cosine(features, reference_features), -np.inf)
    styles: Strings = np.asarray(reference_styles)[similarity.argmax(axis=1)]
    return styles


# ---------------------------------------------------------------- how different are answers to one prompt?


def style_coverage(styles: Sequence[str] | Strings, available: Sequence[str] | Strings) -> float:
    """Return the share of the `available` styles that occurs among the `styles` of one prompt's samples.

    Samples marked with the empty string show no style and count for nothing.
    Raises ValueError when there is nothing to cover or a style is not an available one.
    """
    counts = _style_counts(styles, available)
    return float((counts > 0).mean())


def style_entropy(styles: Sequence[str] | Strings, available: Sequence[str] | Strings) -> float:
    """Return the entropy of one prompt's `styles` over that of an even spread: 1 even, 0 a single style.

    The plug-in estimate, low by about (k - 1) / (2 m log k) for m samples of k styles. 1 when only one style
    is available. Raises as `style_coverage` does, and ValueError when no sample shows a style.
    """
    counts = _style_counts(styles, available)
    if counts.sum() == 0:
        raise ValueError("no sample shows a style, so there is no entropy to measure")
    if len(counts) == 1:
        return 1.0
    shares = counts[counts > 0] / counts.sum()
    return float(np.abs(np.sum(shares * np.log(shares))) / np.log(len(counts)))


def ideal_style_coverage(num_samples: int, num_styles: int) -> float:
    """Return the expected coverage of a sampler that draws the styles evenly: 1 - (1 - 1/k)^m."""
    return float(1 - (1 - 1 / num_styles) ** num_samples)


def diversity(features: ArrayLike) -> float:
    """Return the mean cosine distance between two different samples of one prompt, features [m, d].

    Raises ValueError when there are fewer than two samples.
    """
    return 1 - _mean_off_diagonal(_cosine(features, features))


def ideal_diversity(features: ArrayLike) -> float:
    """Return the expected `diversity` of a sampler that draws the pictures [k, d] evenly, with repeats."""
    return float(1 - _cosine(features, features).mean())


# ---------------------------------------------------------------- how sure is an average?


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson (1927) score interval of a proportion; `z` = 1.96 for 95 %.

    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"expected 0 <= successes <= n and n > 0, got {successes} of {n}")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def bootstrap_interval(
    values: ArrayLike, *, weights: ArrayLike | None = None, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `values` [n], or of sum(values) / sum(weights).

    One value per independent unit: samples of one prompt resemble each other, so resample prompts, not
    samples (with a sum and a count each, or numerator and denominator of a ratio of two models).
    Efron & Tibshirani 1993. Raises ValueError when there are no values.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.ndim != 1 or x.shape != w.shape or len(x) == 0:
        raise ValueError(f"expected values [n] and weights [n] with n > 0, got {x.shape} and {w.shape}")
    draws = np.random.default_rng(seed).integers(len(x), size=(num_resamples, len(x)))
    totals, weight_totals = x[draws].sum(axis=1), w[draws].sum(axis=1)
    usable = weight_totals > 0
    low, high = np.quantile(totals[usable] / weight_totals[usable], (0.025, 0.975))
    return float(low), float(high)


# ---------------------------------------------------------------- parts


def _matrix(features: ArrayLike) -> Floats:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"expected features [n, d] with n > 0, got shape {x.shape}")
    return x


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    x, y = _matrix(a), _matrix(b)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"expected two sets of two or more samples of one width, got {x.shape} and {y.shape}"
        )
    return x, y


def _symmetric_root(matrix: Floats) -> Floats:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def _cubic(a: Floats, b: Floats) -> Floats:
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)


def _mean_off_diagonal(square: Floats) -> float:
    n = len(square)
    if n < 2:
        raise ValueError("a mean over pairs needs two or more samples")
    return float((square.sum() - np.trace(square)) / (n * (n - 1)))


def _distances(a: Floats, b: Floats) -> Floats:
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
    return np.asarray(np.sqrt(np.clip(squared, 0, None)))


def _kth_neighbour_distance(x: Floats, k: int) -> Floats:
    within = _distances(x, x)
    np.fill_diagonal(within, np.inf)
    return np.asarray(np.partition(within, k - 1, axis=1)[:, k - 1])


def _cosine(a: ArrayLike, b: ArrayLike) -> Floats:
    return np.asarray(_unit(_matrix(a)) @ _unit(_matrix(b)).T)


def _unit(x: Floats) -> Floats:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))


def _style_counts(styles: Sequence[str] | Strings, available: Sequence[str] | Strings) -> NDArray[Any]:
    shown = [style for style in styles if style != ""]
    unknown = set(shown) - set(available)
    if len(available) == 0 or len(set(available)) != len(available) or unknown:
        raise ValueError(
            f"expected samples in the distinct styles {list(available)}, got also {sorted(unknown)}"
        )
    return np.array([shown.count(style) for style in available])
