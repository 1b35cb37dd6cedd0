"""A whole run: references, capacity, then every rate by turns and again, and what of it is written down."""

import asyncio
import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flashbulb_service.bench.arrivals import TraceRow
from flashbulb_service.bench.client import Client, Sample, connect
from flashbulb_service.bench.openloop import Run, run_closed, run_plan
from flashbulb_service.bench.report import Slo, Trust, measure, summarise
from flashbulb_service.bench.validity import Drawn, Judge, Mode, UnreadableAnswer, draw_of, read_pictures
from flashbulb_service.bench.workload import (
    Mix,
    Picture,
    Planned,
    Target,
    make_pool,
    plan,
    replay,
    trace_pool,
)
from flashbulb_service.errors import InvalidRequest, ServiceError

SCHEMA = "flashbulb-bench-1"
PER_GROUP = 8  # pictures asked for alone where only their latency is wanted

Say = Callable[[str], None]


class BenchFailed(ServiceError):
    """The server could not be measured."""

    code = "bench_failed"


@dataclass(frozen=True)
class Rate:
    """An offered load: requests per second, or a multiple of the measured capacity."""

    value: float
    relative: bool = False

    @property
    def label(self) -> str:
        """Return the rate as it is given on the command line."""
        return f"{self.value:g}{'x' if self.relative else ''}"


@dataclass(frozen=True)
class Plan:
    """What shall be measured: everything that is needed to do it again."""

    target: Target
    mix: Mix
    rates: tuple[Rate, ...]
    seconds: float = 20.0
    warm_up_s: float = 5.0
    repeats: int = 3
    cv: float = 1.0
    trace: tuple[TraceRow, ...] = ()
    slo_ms: float | None = None
    slo_scale: float = 5.0
    check: Mode = "reference"
    capacity_rps: float | None = None
    capacity_s: float = 10.0
    concurrency: int = 32
    timeout_s: float = 60.0
    max_in_flight: int = 2000
    trust: Trust = field(default_factory=Trust)


@dataclass(frozen=True)
class Alone:
    """What a server does with one request at a time."""

    references: dict[Picture, Drawn]
    latency_ms: dict[str, float]  # median, by group


async def run_session(
    wanted: Plan, stop: asyncio.Event, say: Say, references: Mapping[Picture, Drawn] | None = None
) -> dict[str, Any]:
    """Measure a server and return the result as it is written to JSON.

    Args:
        references: the right pictures, where they are known without asking this server.

    After `stop` nothing more is sent, and what was measured until then is returned.

    Raises:
        BenchFailed: the server does not answer, or not with the same picture twice.
        InvalidRequest: the plan cannot be carried out.
    """
    pool = trace_pool(wanted.mix, wanted.trace) if wanted.trace else make_pool(wanted.mix)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    async with connect(wanted.target, timeout_s=wanted.timeout_s) as client:
        alone = await ask_alone(client, pool, wanted, stop, say, references)
        judge = Judge(wanted.check, references if references is not None else alone.references)
        capacity = wanted.capacity_rps
        if capacity is None and any(rate.relative for rate in wanted.rates) and not stop.is_set():
            capacity = await find_capacity(client, pool, wanted, judge, stop)
            say(f"capacity: {capacity:.1f} requests/s with {wanted.concurrency} in flight")
        slo = Slo(wanted.slo_ms, {group: ms * wanted.slo_scale for group, ms in alone.latency_ms.items()})
        told: dict[Rate, list[dict[str, Any]]] = {rate: [] for rate in wanted.rates}
        for repeat in range(wanted.repeats):
            for rate in wanted.rates:  # by turns, so that a slow minute hits all rates
                if stop.is_set():
                    break
                one = await _measure_one(client, wanted, pool, rate, capacity, repeat, judge, slo, stop, say)
                if one is not None:
                    told[rate].append(one)
    return {
        "schema": SCHEMA,
        "started_at": started_at,
        "plan": describe(wanted),
        "machine": machine(),
        "alone_ms": {group: round(ms, 3) for group, ms in alone.latency_ms.items()},
        "slo_ms": wanted.slo_ms
        or {group: round(ms * wanted.slo_scale, 3) for group, ms in alone.latency_ms.items()},
        "capacity_rps": None if capacity is None else round(capacity, 3),
        "interrupted": stop.is_set(),
        "points": [
            {"rate": rate.label, "summary": summarise(repeats), "repeats": repeats}
            for rate, repeats in told.items()
            if repeats
        ],
    }


async def ask_alone(
    client: Client,
    pool: Sequence[Picture],
    wanted: Plan,
    stop: asyncio.Event,
    say: Say,
    known: Mapping[Picture, Drawn] | None = None,
) -> Alone:
    """Ask for pictures one by one: their pixels are the reference, their times the unloaded latency.

    Raises:
        BenchFailed: there is no usable answer, or equal requests got different pixels.
    """
    needed = pool if wanted.check == "reference" and known is None else _few_per_group(pool)
    say(f"asking for {len(needed)} pictures one by one")
    found: dict[Picture, Drawn] = {}
    times: dict[str, list[float]] = {}
    first = await _ask(client, needed[0], wanted)  # not timed: the first request opens connections and caches
    for number, picture in enumerate(needed, 1):
        if stop.is_set():
            break
        sample = await _ask(client, picture, wanted)
        found[picture] = _drawn(sample)
        times.setdefault(picture.group, []).append(sample.latency_ms)
        if number % 100 == 0:
            say(f"  {number} of {len(needed)}")
    if wanted.check == "reference" and needed[0] in found:
        if _drawn(first).pixels != found[needed[0]].pixels:
            raise BenchFailed(
                "expected equal pixels for two equal requests, got different ones: the server does not follow "
                "the seed; use --check decodable"
            )
        wrong = sum(found[p].pixels != known[p].pixels for p in found) if known is not None else 0
        if wrong:
            raise BenchFailed(
                f"expected the reference's pixels, got others for {wrong} of {len(found)} pictures"
            )
    return Alone(found, {group: statistics.median(values) for group, values in times.items()})


async def find_capacity(
    client: Client, pool: Sequence[Picture], wanted: Plan, judge: Judge, stop: asyncio.Event
) -> float:
    """Return the right answers per second with a fixed number of requests always in flight.

    The first fifth of the time does not count.

    Raises:
        BenchFailed: no answer was right.
    """
    planned = [Planned(0.0, picture, wanted.mix.tenants[0]) for picture in pool]
    run = await run_closed(
        client, planned, concurrency=wanted.concurrency, seconds=wanted.capacity_s, stop=stop
    )
    for sample in run.samples:
        judge(sample)
    end_s = min(wanted.capacity_s, run.wall_s)
    start_s = end_s / 5
    right = sum(sample.valid and start_s <= sample.done_s < end_s for sample in run.samples)
    if not right and not stop.is_set():
        raise BenchFailed(
            f"expected right answers with {wanted.concurrency} requests in flight, got none in {end_s:.0f} s: "
            "lower --concurrency, or give the capacity with --capacity"
        )
    return right / (end_s - start_s)


def trace_speed(rows: Sequence[TraceRow], rate: float) -> float:
    """Return how many times faster a trace must be replayed to offer `rate` on average."""
    return rate * rows[-1].offset_s / len(rows)


def describe(wanted: Plan) -> dict[str, Any]:
    """Write a plan down without its keys; a trace is named by its length and rate."""
    fields = {
        entry.name: getattr(wanted, entry.name)
        for entry in dataclasses.fields(wanted)
        if entry.name not in ("target", "mix", "trace", "rates", "trust")
    }
    target = dataclasses.asdict(wanted.target)
    target["api_key"] = target["api_key"] is not None
    mix = dataclasses.asdict(wanted.mix)
    for tenant in mix["tenants"]:
        tenant["api_key"] = tenant["api_key"] is not None
    return {
        **fields,
        "rates": [rate.label for rate in wanted.rates],
        "target": target,
        "mix": mix,
        "trace_rows": len(wanted.trace),
        "trust": dataclasses.asdict(wanted.trust),
    }


def machine() -> dict[str, Any]:
    """Tell what the generator ran on."""
    try:
        flashbulb = version("flashbulb")
    except PackageNotFoundError:
        flashbulb = "unknown"
    return {
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "flashbulb": flashbulb,
        "aiohttp": version("aiohttp"),
    }


async def _measure_one(
    client: Client,
    wanted: Plan,
    pool: Sequence[Picture],
    rate: Rate,
    capacity: float | None,
    repeat: int,
    judge: Judge,
    slo: Slo,
    stop: asyncio.Event,
    say: Say,
) -> dict[str, Any] | None:
    """Offer one rate once; None when nothing was sent before `stop`."""
    offered = rate.value * (capacity or 0.0) if rate.relative else rate.value
    if rate.relative and not capacity:
        return None
    try:
        if wanted.trace:
            speed = trace_speed(wanted.trace, offered)
            planned: Sequence[Planned] = replay(wanted.mix, wanted.trace, speed=speed)
            seconds = wanted.trace[-1].offset_s / speed - wanted.warm_up_s
        else:
            seconds = wanted.seconds
            planned = plan(
                wanted.mix,
                pool,
                rate=offered,
                seconds=wanted.warm_up_s + seconds,
                cv=wanted.cv,
                repeat=repeat,
            )
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"rate {rate.label}: {error}") from error
    if seconds <= 0:
        raise InvalidRequest(
            f"rate {rate.label}: expected a trace longer than the warm-up of {wanted.warm_up_s:g} s, got "
            f"{seconds + wanted.warm_up_s:.1f} s: lower --warm-up or the rate"
        )
    name = f"{rate.label} ({offered:.1f}/s), {repeat + 1} of {wanted.repeats}"
    begin = time.perf_counter()

    def progress(run: Run, in_flight: int) -> None:
        passed = f"{time.perf_counter() - begin:.0f} of {wanted.warm_up_s + seconds:.0f} s"
        say(f"  {name}: {passed}, {len(run.samples)} sent, {in_flight} in flight")

    run = await run_plan(
        client,
        planned,
        stop=stop,
        judge=judge,
        max_in_flight=wanted.max_in_flight,
        progress=progress,
    )
    if not run.samples:
        return None
    told = measure(
        run, slo=slo, warm_up_s=wanted.warm_up_s, seconds=seconds, offered=offered, trust=wanted.trust
    )
    p99 = told["latency_ms"]["p99"] if told["latency_ms"] else None
    say(f"{name}: goodput {told['goodput_rps']:.1f}/s, p99 {'–' if p99 is None else f'{p99:.1f} ms'}")
    return {"repeat": repeat, **told}


async def _ask(client: Client, picture: Picture, wanted: Plan) -> Sample:
    start = time.perf_counter()
    sample = Sample(Planned(0.0, picture, wanted.mix.tenants[0]))
    await client.send(sample, lambda: time.perf_counter() - start)
    if not sample.answered:
        detail = sample.error or f"status {sample.status}: {_text(sample.body)}"
        raise BenchFailed(f"expected a picture from {client.target.url}, got {detail}")
    return sample


def _text(body: bytes | None) -> str:
    return " ".join((body or b"").decode(errors="replace")[:300].split())


def _drawn(sample: Sample) -> Drawn:
    try:
        return draw_of(read_pictures(sample.body or b""))
    except UnreadableAnswer as error:
        raise BenchFailed(f"status {sample.status}: {error}") from error


def _few_per_group(pool: Sequence[Picture]) -> list[Picture]:
    groups: dict[str, list[Picture]] = {}
    for picture in pool:
        groups.setdefault(picture.group, []).append(picture)
    return [picture for pictures in groups.values() for picture in pictures[:PER_GROUP]]


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
