"""Previews: chosen evenly, drawn from the student's own estimates, told before the picture."""

import io
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flashbulb_distill.bundle import Bundle, open_bundle
from flashbulb_service.backends import ImageRequest, Student
from flashbulb_service.backends.onnx import OnnxBackend
from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.previews import preview_steps
from flashbulb_service.queue import Kept, Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.tasks import ImageTask, Preview
from support.tiny_bundle import make_tiny_bundle

TIMES = (1.0, 0.75, 0.5, 0.25)


@given(st.integers(1, 50), st.integers(0, 3))
def test_previews_are_distinct_steps_before_the_last_evenly_spread(num_steps: int, count: int) -> None:
    steps = preview_steps(num_steps, count)
    assert len(steps) == min(count, num_steps - 1)
    edges = [0, *steps, num_steps]
    gaps = [after - before for before, after in pairwise(edges)]
    assert min(gaps) >= 1
    if steps:
        assert max(gaps) - min(gaps) <= 1


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """In place of the session's: a student of one or four steps."""
    return open_bundle(make_tiny_bundle(tmp_path / "few", step_schedules={4: TIMES}))


@pytest_asyncio.fixture
async def onnx(bundle: Bundle) -> AsyncIterator[OnnxBackend]:
    backend = OnnxBackend(threads=1)
    backend.load(bundle)
    yield backend
    backend.close()


def job(bundle: Bundle, *, steps: int = 4, partial_images: int = 0, sha256: str | None = None) -> NewJob:
    task = ImageTask(
        prompt="dog", seed=3, index=0, width=64, height=64, steps=steps, partial_images=partial_images
    ).model_copy(update={"bundle_sha256": sha256 or bundle.sha256})
    return NewJob(model="tiny@1", bucket=f"tiny@1:64x64:{steps}", payload=task.to_bytes())


def pixels(data: bytes | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)))


async def test_previews_are_the_decoded_estimates_and_come_before_the_picture(
    queue: Queue, start_worker: Callable[..., Any], results: ResultStore, bundle: Bundle, onnx: OnnxBackend
) -> None:
    estimates: list[np.ndarray] = []
    embeddings = onnx.encode_prompts(["dog"])
    onnx.denoise(
        [ImageRequest("dog", 3, 0, 64, 64, 4)],
        embeddings,
        lambda step, num, x0: estimates.append(onnx.decode(x0)),
    )
    kept = Kept(b"record", "owner", events=True)
    (lead,) = (await queue.enqueue([job(bundle, partial_images=2)], keep=kept)).ids
    start_worker()
    (view,) = await queue.wait([lead], 10)
    assert view.state is JobState.DONE
    events = await queue.past_events(lead, after="0")
    assert [event.kind for event in events] == ["queued", "running", "progress", "progress", "done"]
    shown = [Preview.from_bytes(event.data["data"].encode()) for event in events[2:4]]
    assert [(one.partial_image_index, one.step, one.steps) for one in shown] == [(0, 1, 4), (1, 2, 4)]
    for one in shown:
        np.testing.assert_array_equal(pixels(await results.get(one.file)), estimates[one.step - 1][0])
    alone = Student(onnx).generate([ImageRequest("dog", 3, 0, 64, 64, 4)])[0]
    np.testing.assert_array_equal(estimates[-1][0], alone)


async def test_nobody_who_did_not_ask_is_shown_one_or_pays_for_it(
    queue: Queue, start_worker: Callable[..., Any], bundle: Bundle, watched: Any
) -> None:
    decoded: list[int] = []
    decode = watched.inner.decode
    watched.decode = lambda latents: (decoded.append(len(latents)), decode(latents))[1]
    kept = Kept(b"record", "owner", events=True)
    (lead,) = (await queue.enqueue([job(bundle), job(bundle)], keep=kept)).ids[:1]
    start_worker()
    await queue.wait([lead], 10)
    assert "progress" not in [event.kind for event in await queue.past_events(lead, after="0")]
    assert decoded == [2]


async def test_a_checker_that_refuses_holds_previews_back_too(
    queue: Queue, start_worker: Callable[..., Any], bundle: Bundle, wait_until: Callable[..., Awaitable[None]]
) -> None:
    kept = Kept(b"record", "owner", events=True)
    (lead,) = (await queue.enqueue([job(bundle, partial_images=2)], keep=kept)).ids

    class Refuses:
        def allows(self, pixels: np.ndarray) -> bool:
            return False

    start_worker(checker=Refuses())
    (view,) = await queue.wait([lead], 10)
    assert view.state is JobState.FAILED
    assert "progress" not in [event.kind for event in await queue.past_events(lead, after="0")]


async def test_a_backlog_does_not_meet_another_bundle_of_its_model_s_name_and_version(
    queue: Queue, start_worker: Callable[..., Any], bundle: Bundle
) -> None:
    other, mine = (await queue.enqueue([job(bundle, sha256="0" * 64), job(bundle)])).ids
    start_worker()
    refused, drawn = await queue.wait([other, mine], 10)
    assert (refused.state, drawn.state) == (JobState.FAILED, JobState.DONE)
    assert refused.error is not None and refused.error.code == "model_replaced"
    assert "send the request again" in refused.error.message
