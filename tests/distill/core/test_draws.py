"""Draws of whole batches repeat, differ where their keys do, and follow their distributions."""

import numpy as np
import pytest

from flashbulb_distill.core.draws import BatchDraws


def test_a_batch_repeats_and_another_step_purpose_or_seed_gives_others():
    draws = BatchDraws(3)
    one = draws.normal("a", 5, range(8), (2, 1))
    assert one.shape == (8, 2, 1)
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, BatchDraws(3).normal("a", 5, range(8), (2, 1)))
    for other in (draws.normal("a", 6, range(8), (2, 1)), draws.normal("b", 5, range(8), (2, 1))):
        assert not np.isclose(one, other).any()
    assert not np.isclose(one, BatchDraws(4).normal("a", 5, range(8), (2, 1))).any()


def test_batches_follow_their_distributions():
    draws, rows = BatchDraws(0), range(20_000)
    normal = draws.normal("n", 0, rows, (1,))
    assert (normal.mean(), normal.std()) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.03))
    uniform = draws.uniform("u", 0, rows)
    assert (uniform.min() >= 0, uniform.max() < 1, uniform.mean()) == (
        True,
        True,
        pytest.approx(0.5, abs=0.02),
    )
    counts = np.bincount(draws.integers("i", 0, rows, 4))
    assert counts.min() > 4700
    assert len(counts) == 4
