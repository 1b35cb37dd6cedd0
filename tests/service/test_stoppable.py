"""Waits that a worker gives up when it is to stop."""

import asyncio

import pytest

from flashbulb_service.stoppable import Stoppable


async def never() -> None:
    await asyncio.Event().wait()


async def test_what_ends_by_itself_gives_its_result() -> None:
    async with Stoppable.by(asyncio.Event()) as until_stop:
        assert await until_stop(asyncio.sleep(0, "done")) == "done"


async def test_a_wait_ends_when_the_event_is_set_and_its_work_is_cancelled() -> None:
    stop, cancelled = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            await never()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with Stoppable.by(stop) as until_stop:
        waiting = asyncio.ensure_future(until_stop(work()))
        await asyncio.sleep(0)
        stop.set()
        assert await waiting is None
    assert cancelled.is_set()


async def test_nothing_is_waited_for_after_the_event() -> None:
    stop = asyncio.Event()
    stop.set()
    async with Stoppable.by(stop) as until_stop:
        assert await until_stop(never()) is None


async def test_work_that_fails_or_times_out_by_itself_raises() -> None:
    async def fail(error: Exception) -> None:
        raise error

    async with Stoppable.by(asyncio.Event()) as until_stop:
        for error in (TimeoutError("its own"), ValueError("wrong")):
            with pytest.raises(type(error), match=str(error)):
                await until_stop(fail(error))


async def test_a_task_that_is_cancelled_from_outside_is_cancelled() -> None:
    async with Stoppable.by(asyncio.Event()) as until_stop:
        waiting = asyncio.ensure_future(until_stop(never()))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
