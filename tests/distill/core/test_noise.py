"""Request noise: a function of seed, image and step, and of nothing else."""

import numpy as np
import pytest
from scipy.stats import kstest

from flashbulb_distill.core.draws import Draws
from flashbulb_distill.core.noise import MAX_SEED, draw_noise

SHAPE = (64, 8, 8)


def test_same_request_gives_the_same_noise_and_another_seed_image_or_step_other_noise():
    first = draw_noise(7, 0, SHAPE)
    np.testing.assert_array_equal(first, draw_noise(7, 0, SHAPE))
    for other in (draw_noise(8, 0, SHAPE), draw_noise(7, 1, SHAPE), draw_noise(7, 0, SHAPE, step=1)):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.06


def test_first_numbers_never_change():
    """A published image must stay reproducible: these numbers are part of the contract."""
    expected = np.random.Generator(np.random.Philox(key=np.array([7, 2], np.uint64))).standard_normal(
        3, np.float32
    )
    np.testing.assert_array_equal(draw_noise(7, 2, (3,)), expected)


def test_noise_is_unit_normal():
    assert kstest(draw_noise(MAX_SEED, 3, (20_000,)), "norm").pvalue > 1e-3


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (MAX_SEED + 1, 0), (0, -1)])
def test_seeds_and_indices_out_of_range_are_refused(seed, index):
    with pytest.raises(ValueError, match="expected"):
        draw_noise(seed, index, (1,))


def test_a_sample_draws_the_same_wherever_it_stands_in_the_batch():
    draws = Draws(3)
    whole = draws.normal("x", 5, range(8), (4,))
    np.testing.assert_array_equal(draws.normal("x", 5, [6, 1], (4,)), whole[[6, 1]])
    np.testing.assert_array_equal(draws.uniform("x", 5, [2]), draws.uniform("x", 5, range(4))[2:3])


def test_purposes_seeds_and_steps_have_streams_of_their_own():
    base = Draws(3).normal("x", 5, [0], (2000,))
    others = (Draws(4).normal("x", 5, [0], (2000,)), Draws(3).normal("y", 5, [0], (2000,)))
    for other in (*others, Draws(3).normal("x", 6, [0], (2000,)), Draws(3).normal("x", 5, [1], (2000,))):
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.1
