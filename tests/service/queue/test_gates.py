"""Paused and draining models."""

import asyncio

import pytest

from flashbulb_service.errors import ModelDraining
from flashbulb_service.jobs import JobError, NewJob


def new(model: str = "emoji@1", payload: bytes = b"p") -> NewJob:
    return NewJob(model=model, bucket="64x64", payload=payload)


async def test_paused_model_takes_jobs_and_gives_none_to_workers(queue):
    await queue.set_gate("emoji@1", "paused")
    await queue.enqueue([new()] * 3)
    await queue.enqueue([new("other@1", b"other")])
    assert [job.payload for job in await queue.claim("w", ["emoji@1", "other@1"], 8, 5)] == [b"other"]
    assert await queue.claim("w", ["emoji@1", "other@1"], 8, 5) == []
    assert await queue.gates() == {"emoji@1": "paused"}
    await queue.set_gate("emoji@1", None)
    assert len(await queue.claim("w", ["emoji@1"], 8, 5)) == 3
    assert await queue.gates() == {}


async def test_workers_of_a_paused_model_sleep_and_resume_wakes_them(queue):
    await queue.enqueue([new()])
    await queue.set_gate("emoji@1", "paused")
    await queue.enqueue([new()])
    await queue.reap()  # it would put a lost token back
    assert await queue.wait_for_work(["emoji@1"], 0.05) is None
    waiting = asyncio.create_task(queue.wait_for_work(["emoji@1"], 10))
    await queue.set_gate("emoji@1", None)
    assert await waiting is not None


async def test_a_batch_in_hand_survives_a_pause(queue):
    await queue.enqueue([new()] * 2)
    done, failing = await queue.claim("w", ["emoji@1"], 2, 5)
    await queue.set_gate("emoji@1", "paused")
    assert await queue.complete("w", done, b"r")
    await queue.fail("w", failing, JobError("x", "y"), retry=True, delay_s=0)
    await queue.reap()
    assert (await queue.stats()).queued == {"emoji@1": 1}
    assert await queue.claim("w", ["emoji@1"], 2, 5) == []


async def test_draining_model_finishes_its_jobs_and_takes_none(queue):
    first = await queue.enqueue([new()], idempotency_key="k")
    await queue.set_gate("emoji@1", "draining")
    with pytest.raises(ModelDraining, match="emoji@1"):
        await queue.enqueue([new()])
    assert (await queue.enqueue([new()], idempotency_key="k")).ids == first.ids  # an answer, not new work
    await queue.enqueue([new("other@1")])
    assert len(await queue.claim("w", ["emoji@1"], 8, 5)) == 1


async def test_dead_letters_are_listed_newest_first_and_replayed(queue):
    ids = (await queue.enqueue([new()] * 3)).ids
    for at, job in enumerate(await queue.claim("w", ["emoji@1"], 3, 5)):
        await queue.fail("w", job, JobError("broken", f"{at}"), retry=False, now=2e9 + at)
    letters = await queue.dead_letters()
    assert [view.error.message for view in letters] == ["2", "1", "0"]
    assert [view.id for view in await queue.dead_letters(limit=1, offset=1)] == [letters[1].id]
    assert await queue.replay_dead(ids[0])
    assert len(await queue.dead_letters()) == 2
