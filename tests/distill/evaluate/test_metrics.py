import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashbulb_distill.evaluate import metrics


def normal(n: int, d: int, *, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((n, d))


def with_exact_moments(mean: NDArray[np.float64], cov: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Samples whose sample mean and covariance are exactly those asked for."""
    x = normal(n, len(mean))
    x -= x.mean(axis=0)
    whitened = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return whitened @ np.linalg.cholesky(cov).T + mean


# ---------------------------------------------------------------- Frechet distance


def test_frechet_distance_of_two_gaussians_is_the_closed_form_of_diagonal_covariances() -> None:
    a = with_exact_moments(np.array([0.0, 0.0]), np.diag([4.0, 1.0]), 50)
    b = with_exact_moments(np.array([3.0, 4.0]), np.diag([1.0, 9.0]), 70)
    # |mean difference|^2 + sum of (standard deviation difference)^2
    assert metrics.frechet_distance(a, b) == pytest.approx(25 + (2 - 1) ** 2 + (1 - 3) ** 2)


def test_frechet_distance_matches_scipys_matrix_root_for_correlated_features() -> None:
    a = normal(80, 5) @ normal(5, 5, seed=1)
    b = normal(90, 5, seed=2) @ normal(5, 5, seed=3) + 0.3
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_survives_a_singular_covariance() -> None:
    a = np.column_stack([normal(20, 2), np.zeros(20)])
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(a, a + np.array([0, 0, 2])) == pytest.approx(4, abs=1e-6)


def test_projection_keeps_distances_within_the_main_plane_and_drops_the_rest() -> None:
    basis = np.linalg.qr(normal(6, 6))[0]
    inside = normal(100, 2) * [5, 3]
    features = inside @ basis[:2] + 1e-3 * normal(100, 4, seed=1) @ basis[2:] + 7.0
    projected = metrics.fit_projection(features, 2)(features)
    assert projected.shape == (100, 2)
    assert np.linalg.norm(projected[0] - projected[1]) == pytest.approx(
        np.linalg.norm(inside[0] - inside[1]), rel=1e-3
    )
    assert np.cov(projected.T)[0, 1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("num_components", [0, 5, 10])
def test_projection_onto_components_that_the_data_do_not_have_is_refused(num_components: int) -> None:
    with pytest.raises(ValueError, match="have 4 components"):
        metrics.fit_projection(normal(5, 10), num_components)


# ---------------------------------------------------------------- kernel distance


def test_kernel_distance_matches_sums_over_pairs() -> None:
    a, b = normal(7, 4), normal(5, 4, seed=1) + 0.5

    def k(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return float((x @ y / 4 + 1) ** 3)

    within_a = [k(x, y) for x, y in itertools.permutations(a, 2)]
    within_b = [k(x, y) for x, y in itertools.permutations(b, 2)]
    across = [k(x, y) for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(across)
    assert metrics.kernel_distance(a, b) == pytest.approx(expected)


def test_kernel_distance_is_unbiased() -> None:
    """Over many draws from one distribution the mean is zero within four standard errors, and not clipped."""
    draws = [metrics.kernel_distance(normal(12, 3, seed=s), normal(9, 3, seed=s + 1000)) for s in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20
    assert min(draws) < 0


# ---------------------------------------------------------------- precision, recall, density, coverage


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(5, 12), m=st.integers(5, 12), k=st.integers(1, 4))
def test_manifold_matches_loops_over_balls(seed: int, n: int, m: int, k: int) -> None:
    real, fake = normal(n, 2, seed=seed), 1.5 * normal(m, 2, seed=seed + 1) + 0.3

    def radius(points: NDArray[np.float64], i: int) -> float:
        others = [math.dist(points[i], p) for j, p in enumerate(points) if j != i]
        return sorted(others)[k - 1]

    def inside(point: NDArray[np.float64], points: NDArray[np.float64]) -> list[bool]:
        return [math.dist(point, p) <= radius(points, i) for i, p in enumerate(points)]

    in_real = [inside(f, real) for f in fake]
    got = metrics.manifold(real, fake, k)
    assert got.precision == pytest.approx(np.mean([any(row) for row in in_real]))
    assert got.recall == pytest.approx(np.mean([any(inside(r, fake)) for r in real]))
    assert got.density == pytest.approx(sum(map(sum, in_real)) / (k * m))
    assert got.coverage == pytest.approx(np.mean(np.any(in_real, axis=0)))


def test_copies_of_one_real_sample_are_precise_but_cover_little() -> None:
    real = normal(100, 4)
    collapsed = np.repeat(real[:1], 50, axis=0) + 1e-6 * normal(50, 4, seed=1)
    got = metrics.manifold(real, collapsed)
    assert got.precision == 1.0
    assert got.recall <= 0.02
    assert got.coverage < 0.2


def test_manifold_without_a_kth_neighbour_is_refused() -> None:
    with pytest.raises(ValueError, match="3-th neighbour needs more than 3 samples"):
        metrics.manifold(normal(3, 2), normal(9, 2), k=3)


# ---------------------------------------------------------------- retrieval and style

DIRECTIONS = np.array([[1.0, 0.0], [0.9, 0.3], [0.0, 1.0], [-0.3, 0.9]])  # two apples, two boats
CONCEPTS = ["apple", "apple", "boat", "boat"]
STYLES = ["flat", "round", "flat", "round"]


def test_retrieval_compares_directions_not_lengths() -> None:
    queries = np.array([[100.0, 1.0], [0.01, 1.0], [1.0, 0.0]])
    hits = metrics.retrieval_hits(queries, ["apple", "apple", "boat"], DIRECTIONS, CONCEPTS)
    assert hits.tolist() == [True, False, False]


def test_retrieval_among_k_looks_at_the_k_nearest_pictures() -> None:
    query = np.array([[0.05, 1.0]])  # boat, boat, apple, apple
    hits = [metrics.retrieval_hits(query, ["apple"], DIRECTIONS, CONCEPTS, k=k).item() for k in (1, 2, 3, 4)]
    assert hits == [False, False, True, True]


def test_retrieval_of_a_reference_picture_leaves_itself_out() -> None:
    lonely = [*CONCEPTS[:3], "ship"]
    hits = metrics.retrieval_hits(DIRECTIONS, lonely, DIRECTIONS, lonely, own_index=range(4))
    assert hits.tolist() == [True, True, False, False]


@pytest.mark.parametrize(("k", "own"), [(0, None), (5, None), (4, [0])])
def test_more_neighbours_than_pictures_are_refused(k: int, own: list[int] | None) -> None:
    with pytest.raises(ValueError, match="nearest of"):
        metrics.retrieval_hits(DIRECTIONS[:1], ["apple"], DIRECTIONS, CONCEPTS, k=k, own_index=own)


def test_style_is_judged_among_the_pictures_of_the_querys_own_concept() -> None:
    queries = np.array([[0.0, 1.0], [0.0, 1.0], [-1.0, 1.0]])
    styles = metrics.nearest_styles(queries, ["apple", "boat", "boat"], DIRECTIONS, CONCEPTS, STYLES)
    # The first lies on the flat boat, but as an apple it is nearer the round one.
    assert styles.tolist() == ["round", "flat", "round"]


def test_style_of_an_unknown_concept_is_refused() -> None:
    with pytest.raises(ValueError, match="no reference picture shows 'train'"):
        metrics.nearest_styles(DIRECTIONS[:1], ["train"], DIRECTIONS, CONCEPTS, STYLES)


@pytest.mark.parametrize(
    ("styles", "coverage", "entropy"),
    [
        (["a"] * 16, 1 / 3, 0.0),
        (["a"] * 8 + ["b"] * 8, 2 / 3, math.log(2) / math.log(3)),
        (["a", "b", "c"], 1.0, 1.0),
        (["a", "", "a", ""], 1 / 3, 0.0),
        (["a"] * 2 + ["b", "c"], 1.0, 1.5 * math.log(2) / math.log(3)),
    ],
    ids=["collapsed", "two of three", "even", "unrecognised samples", "uneven"],
)
def test_style_coverage_and_entropy_of_hand_made_cases(
    styles: list[str], coverage: float, entropy: float
) -> None:
    assert metrics.style_coverage(styles, ["a", "b", "c"]) == pytest.approx(coverage)
    assert metrics.style_entropy(styles, ["a", "b", "c"]) == pytest.approx(entropy)


def test_one_available_style_is_covered_evenly_by_any_sample() -> None:
    assert metrics.style_coverage(["a"], ["a"]) == 1
    assert metrics.style_entropy(["a"], ["a"]) == 1


def test_samples_without_a_recognised_style_cover_nothing_and_have_no_entropy() -> None:
    assert metrics.style_coverage(["", ""], ["a", "b"]) == 0
    with pytest.raises(ValueError, match="no sample shows a style"):
        metrics.style_entropy(["", ""], ["a", "b"])


@pytest.mark.parametrize("available", [[], ["a", "a"], ["b"]], ids=["none", "twice", "another"])
def test_styles_outside_the_available_ones_are_refused(available: list[str]) -> None:
    with pytest.raises(ValueError, match="distinct styles"):
        metrics.style_coverage(["a"], available)


def test_ideal_style_coverage_is_the_mean_over_all_sequences() -> None:
    sequences = itertools.product("abc", repeat=4)
    expected = np.mean([metrics.style_coverage(s, ["a", "b", "c"]) for s in sequences])
    assert metrics.ideal_style_coverage(4, 3) == pytest.approx(expected)


def test_diversity_is_the_mean_over_pairs() -> None:
    assert metrics.diversity([[1, 0], [0, 2], [-3, 0]]) == pytest.approx((1 + 2 + 1) / 3)
    assert metrics.diversity([[1, 1], [2, 2]]) == pytest.approx(0)


def test_ideal_diversity_is_the_mean_over_all_drawn_pairs() -> None:
    pictures = normal(3, 5)
    pairs = [metrics.diversity(pictures[list(pair)]) for pair in itertools.product(range(3), repeat=2)]
    assert metrics.ideal_diversity(pictures) == pytest.approx(np.mean(pairs))


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (120, 196)])
def test_wilson_interval_matches_scipys(successes: int, n: int) -> None:
    expected = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert metrics.wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_proportions_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        metrics.wilson_interval(successes, n)


def test_bootstrap_interval_of_a_mean_agrees_with_the_normal_one() -> None:
    x = normal(400, 1)[:, 0] + 5
    low, high = metrics.bootstrap_interval(x)
    half = 1.96 * x.std() / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=half / 8)
    assert metrics.bootstrap_interval(x) == (low, high)


def test_bootstrap_interval_of_a_ratio_pairs_its_two_parts() -> None:
    theirs = np.random.default_rng(0).uniform(0.2, 1, 50)
    # Always nine tenths of the other: however the prompts are drawn, the ratio is the same.
    assert metrics.bootstrap_interval(0.9 * theirs, weights=theirs) == pytest.approx((0.9, 0.9))


@pytest.mark.parametrize(("values", "weights"), [([], None), ([1.0], [1.0, 2.0])], ids=["none", "unequal"])
def test_bootstrap_without_matching_values_is_refused(
    values: list[float], weights: list[float] | None
) -> None:
    with pytest.raises(ValueError, match="expected values"):
        metrics.bootstrap_interval(values, weights=weights)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(3)], ids=["empty", "vector"])
def test_features_of_another_shape_are_refused(bad: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="expected features"):
        metrics.diversity(bad)


def test_sets_of_different_width_are_refused() -> None:
    with pytest.raises(ValueError, match="of one width"):
        metrics.kernel_distance(normal(5, 3), normal(5, 4))
