"""Drawing that begins before its claim is answered, and what happens when the answer is no."""

import asyncio
import random
import time

from flashbulb_service.jobs import JobState


async def test_a_refused_claim_hands_nothing_back_that_is_ours_by_another_one(
    queue, start_worker, watched, picture_job
):
    """Jobs that come while the device is busy: each is drawn in one attempt, none twice."""
    watched.before = lambda requests: time.sleep(0.03)
    start_worker()
    draw, ids = random.Random(3), []
    for seed in range(80):
        ids += (await queue.enqueue([picture_job(seed=seed)])).ids
        await asyncio.sleep(draw.expovariate(60))
    views = await queue.wait(ids, 30)
    assert {(view.state, view.attempt) for view in views} == {(JobState.DONE, 1)}


async def test_a_job_that_was_alone_some_time_ago_is_not_begun_before_its_claim(
    queue, start_worker, watched, picture_job, wait_until
):
    """By then others have come: what is begun for it alone would be thrown away."""
    watched.before = lambda requests: time.sleep(0.1)
    start_worker()
    await queue.wait((await queue.enqueue([picture_job("to learn the time")])).ids, 20)
    first = (await queue.enqueue([picture_job("first")])).ids

    async def begun():
        return len(watched.batches) == 2

    await wait_until(begun)
    ids = [(await queue.enqueue([picture_job(f"later {number}")])).ids[0] for number in range(3)]
    await queue.wait([*first, *ids], 20)
    assert watched.batches[1:] == [["first"], [f"later {number}" for number in range(3)]]
