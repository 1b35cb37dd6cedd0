"""The load generator's parts against theory and against small servers that misbehave in known ways."""

import asyncio

import numpy as np
import pytest
from aiohttp import web

from flashbulb_service.bench.arrivals import draw_offsets
from flashbulb_service.bench.openloop import Run
from flashbulb_service.bench.report import Slo, Trust, measure
from flashbulb_service.bench.workload import Mix, make_pool, plan
from support.small_server import answer, load, serving


def summary(run: Run, *, slo_ms: float, seconds: float) -> dict:
    return measure(
        run,
        slo=Slo(slo_ms),
        warm_up_s=0,
        seconds=seconds,
        offered=1,
        trust=Trust(max_lag_ms=1e6, max_cpu_share=1e6),
    )


@pytest.mark.parametrize("cv", [0.0, 1.0, 2.0])
def test_gaps_have_the_rate_and_the_variation_asked_for(cv: float) -> None:
    gaps = np.diff(draw_offsets(np.random.default_rng(3), 100, 400, cv))
    assert gaps.mean() == pytest.approx(0.01, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.08)


def test_equal_seeds_plan_equal_requests() -> None:
    mix = Mix(seed=5, zipf=1.1)
    pool = make_pool(mix)
    first, again = (plan(mix, pool, rate=50, seconds=4, cv=1, repeat=0) for _ in range(2))
    assert first == again
    assert first != plan(mix, pool, rate=50, seconds=4, cv=1, repeat=1)


async def test_wrong_pixels_are_no_goodput() -> None:
    async def wrong(request: web.Request) -> web.Response:
        return web.Response(body=answer(8))

    async with serving(wrong) as url:
        told = summary(await load(url, [0.0, 0.01, 0.02]), slo_ms=1e6, seconds=1)
    assert (told["achieved_rps"], told["goodput_rps"]) == (3, 0)
    assert told["errors"] == {"200 wrong_pixels": 3}


async def test_right_pixels_are_goodput_and_429_is_shed() -> None:
    count = 0

    async def every_other(request: web.Request) -> web.Response:
        nonlocal count
        count += 1
        return web.Response(body=answer(7)) if count % 2 else web.Response(status=429, body=b"{}")

    async with serving(every_other) as url:
        told = summary(await load(url, [0.0, 0.05, 0.1, 0.15]), slo_ms=1e6, seconds=1)
    assert (told["goodput_rps"], told["shed"], told["attainment"]) == (2, 0.5, 0.5)


async def test_a_server_that_can_compress_is_asked_not_to() -> None:
    """LitServe compresses whatever it may; its answers were read as no pictures."""

    async def compress(request: web.Request) -> web.Response:
        response = web.Response(body=answer(7) + b" " * 5000)
        response.enable_compression()
        return response

    async with serving(compress) as url:
        told = summary(await load(url, [0.0]), slo_ms=1e6, seconds=1)
    assert (told["valid"], told["errors"]) == (1, {})


async def test_a_stalled_server_is_charged_for_everyone_who_waited() -> None:
    """One stall of 0.4 s: a closed loop would see one slow request, the plan says that twenty were."""
    free = asyncio.Lock()
    stalled = False

    async def stall_once(request: web.Request) -> web.Response:
        nonlocal stalled
        async with free:
            if not stalled:
                stalled = True
                await asyncio.sleep(0.4)
        return web.Response(body=answer(7))

    async with serving(stall_once) as url:
        run = await load(url, [number / 50 for number in range(20)])
    latencies = [sample.latency_ms for sample in run.samples]
    assert latencies[0] >= 400
    assert all(latency >= 400 - 20 * number - 2 for number, latency in enumerate(latencies))


async def test_timeouts_count_and_a_full_generator_voids_the_run() -> None:
    never = asyncio.Event()

    async def hang(request: web.Request) -> web.Response:
        await never.wait()
        return web.Response()

    async with serving(hang) as url:
        run = await load(url, [0.0, 0.0, 0.0], timeout_s=0.2, max_in_flight=2)
        never.set()
    told = summary(run, slo_ms=50, seconds=1)
    assert told["errors"] == {"no answer timeout": 2}
    assert told["latency_ms"]["p50"] >= 200
    assert any("limit on requests in flight" in reason for reason in told["invalid"])
