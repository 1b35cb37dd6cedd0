"""The synthetic device: its time, its failures, and how the worker isolates them."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashbulb_service.backends import ImageRequest, Student, create_backend
from flashbulb_service.backends.synthetic import SyntheticBackend, SyntheticDevice
from flashbulb_service.errors import OutOfMemory
from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.queue import Queue

FAST = {"floor_ms": 0.0, "base_ms": 0.0, "row_ms": 0.0}


def request(prompt: str = "dog", seed: int = 1, index: int = 0) -> ImageRequest:
    return ImageRequest(prompt, seed, index, 64, 64)


def test_a_batch_takes_its_time_and_the_picture_is_the_requests_alone() -> None:
    options = '{"floor_ms": 0, "base_ms": 10, "row_ms": 5}'
    backend = Student(create_backend("synthetic", threads=1, synthetic=options))
    start = time.perf_counter()
    many = backend.generate([request("cat"), request(), request(seed=2)])
    assert time.perf_counter() - start >= 0.025
    alone = backend.generate([request()])[0]
    np.testing.assert_array_equal(many[1], alone)
    assert alone.shape == (64, 64, 3) and alone.dtype == np.uint8
    assert len({picture.tobytes() for picture in many}) == 3


def test_equal_seeds_give_equal_noise_and_hangs() -> None:
    device = SyntheticDevice(noise=0.3, hang_share=0.2, seed=5)
    first, second = ([SyntheticBackend(device)._next_ms(2) for _ in range(3)] for _ in range(2))
    assert first == second


def test_too_many_rows_run_out_of_memory() -> None:
    backend = Student(SyntheticBackend(SyntheticDevice(memory_rows=2, **FAST)))
    assert len(backend.generate([request()] * 2)) == 2
    with pytest.raises(OutOfMemory, match="at most 2 rows"):
        backend.generate([request()] * 3)


def test_warming_up_runs_all_sizes_that_fit_with_prompts_of_full_length(watched: Any) -> None:
    watched.inner = SyntheticBackend(SyntheticDevice(memory_rows=2, **FAST))
    Student(watched).warm_up(64, 64, (1, 2, 4, 8))
    assert [len(batch) for batch in watched.batches] == [8, 4, 2, 1], (
        "the largest first, whatever does not fit"
    )
    for batch in watched.batches:
        assert len(set(batch)) == len(batch), "each is encoded"
        assert all(len(prompt.split()) > 512 for prompt in batch)


async def test_out_of_memory_halves_the_batch_burns_no_attempt_and_the_cap_learns(
    queue: Queue, start_worker: Callable[..., Any], watched: Any, picture_job: Callable[..., NewJob]
) -> None:
    watched.inner = SyntheticBackend(SyntheticDevice(memory_rows=3, **FAST))
    ids = (await queue.enqueue([picture_job(seed=seed, max_attempts=1) for seed in range(32)])).ids
    start_worker(cap=8)
    views = await queue.wait(ids, 10)
    assert [(view.state, view.attempt) for view in views] == [(JobState.DONE, 1)] * 32
    sizes = [len(batch) for batch in watched.batches]
    assert sizes[0] == 8
    failed = [size for size in sizes if size > 3]
    assert (
        len(failed) <= 6
    )  # one claim of 8 and its halves, and one that was claimed ahead: later ones are of 2
    assert {size for size in sizes if size <= 3} == {2}


async def test_only_the_guilty_row_of_a_batch_fails(
    queue: Queue, start_worker: Callable[..., Any], watched: Any, picture_job: Callable[..., NewJob]
) -> None:
    watched.inner = SyntheticBackend(SyntheticDevice(bad_word="poison", **FAST))
    prompts = ["a", "b", "c", "poison", "e", "f", "g", "h"]
    ids = (await queue.enqueue([picture_job(prompt, max_attempts=1) for prompt in prompts])).ids
    start_worker(cap=8)
    views = await queue.wait(ids, 10)
    assert [view.state is JobState.DONE for view in views] == [prompt != "poison" for prompt in prompts]
    assert [view.attempt for view in views] == [1] * 8
    assert [len(batch) for batch in watched.batches] == [8, 4, 2, 2, 1, 1, 4]
