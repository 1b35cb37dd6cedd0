"""The words of the queue: what a job may be called, and where it may go."""

import pytest

from flashbulb_service.jobs import LEGAL_MOVES, TERMINAL, JobState, NewJob
from flashbulb_service.queue.keys import Keys


def test_every_state_has_its_moves():
    assert set(LEGAL_MOVES) == set(JobState)


def test_only_an_operators_replay_leads_out_of_an_end():
    assert {state: LEGAL_MOVES[state] for state in TERMINAL} == {
        JobState.DONE: frozenset(),
        JobState.CANCELLED: frozenset(),
        JobState.FAILED: frozenset({JobState.QUEUED}),
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"model": "a:b"},  # a colon would let two models share a key
        {"model": "a b"},
        {"bucket": "x\n"},
        {"tenant": "x" * 201},
        {"tenant": "a%s"},
        {"cost": 0.0},
        {"cost": float("nan")},
        {"cost": float("inf")},
        {"deadline_s": 0.0},
        {"deadline_s": float("inf")},
        {"max_attempts": 0},
    ],
    ids=str,
)
def test_job_that_could_break_the_queue_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NewJob(**{"model": "emoji@1", "bucket": "64x64", "payload": b"", **wrong})


@pytest.mark.parametrize("namespace", ["", "a{b", "a}b", "a b", "x" * 101])
def test_namespace_that_would_break_the_hash_tag_is_refused(namespace):
    with pytest.raises(ValueError, match="namespace"):
        Keys(namespace)


def test_all_keys_of_a_namespace_share_its_hash_tag():
    keys = Keys("prod")
    assert keys.job("1") == "{prod}:job:1"
    assert keys.wake("emoji@1").startswith(keys.tag)
    assert keys.done("i").startswith(keys.tag)
