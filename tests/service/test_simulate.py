"""The scheduling decisions under load, in simulated time: the same functions as the worker's."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from flashbulb_service.simulate import Arrival, goodput, mean_latency_bound, poisson, simulate
from flashbulb_service.timing import Tau

TAU = Tau(17.0, 4.3, 4.93)
CAP, SLO_MS = 8, 100.0
CAPACITY = 1000 * CAP / TAU(CAP)  # 182.9 requests per second


def offered(load: float, num: int = 40_000, seed: int = 3) -> list[Arrival]:
    """Poisson arrivals at exactly this multiple of the capacity: drawn, then stretched to the rate."""
    drawn = poisson(CAPACITY, num, SLO_MS, seed=seed)
    stretch = num / load / CAPACITY * 1000 / drawn[-1].at_ms
    return [replace(one, at_ms=one.at_ms * stretch) for one in drawn]


def most_on_time(arrivals: Sequence[Arrival], tau: Tau, cap: int, most_lost: int) -> int:
    """How many a scheduler that knew every arrival beforehand, and might wait, could serve on time.

    Exact, by dynamic programming over (arrivals looked at, arrivals lost) -> earliest end. With equal deadlines
    some best schedule serves in order of arrival, and loses rows only between batches.
    """
    ends = [np.full(most_lost + 1, np.inf) for _ in range(cap + 1)]  # a ring: of the last cap + 1 arrivals
    ends[0][0] = 0.0
    for last in range(1, len(arrivals) + 1):
        best = np.concatenate(([np.inf], ends[(last - 1) % (cap + 1)][:-1]))
        for size in range(1, min(cap, last) + 1):
            first = arrivals[last - size]
            start = np.maximum(ends[(last - size) % (cap + 1)], arrivals[last - 1].at_ms)
            end = start + tau(size)
            best = np.minimum(best, np.where(end <= first.at_ms + first.slo_ms, end, np.inf))
        ends[last % (cap + 1)] = best
    return len(arrivals) - int(np.flatnonzero(np.isfinite(ends[len(arrivals) % (cap + 1)]))[0])


# With noise the best of all policies tried reached 94.0 % at exactly the capacity; see docs/adr/0010.
@pytest.mark.parametrize(
    ("load", "noise", "margin", "floor"),
    [
        *((1.0, 0.0, 1.0, 0.95), (1.5, 0.0, 1.0, 0.985), (2.0, 0.0, 1.0, 0.985)),
        *((1.0, 0.1, 1.18, 0.935), (1.5, 0.1, 1.18, 0.97), (2.0, 0.1, 1.18, 0.97)),
    ],
)
def test_goodput_stays_at_capacity_under_overload(
    load: float, noise: float, margin: float, floor: float
) -> None:
    tau = Tau(17.0, 4.3, 4.93, margin)
    rate, on_time = goodput(simulate(offered(load), {"b": tau}, {"b": CAP}, noise=noise, seed=4))
    assert rate >= floor * CAPACITY
    assert on_time >= 0.99


def test_goodput_at_the_capacity_is_within_one_and_a_half_per_cent_of_a_scheduler_that_knows_the_future() -> (
    None
):
    tau = Tau(17.0, 4.3, 4.93, margin=1.0)
    arrivals = offered(1.0, 8_000)
    on_time = sum(one.is_on_time for one in simulate(arrivals, {"b": tau}, {"b": CAP}))
    bound = most_on_time(arrivals, tau, CAP, most_lost=600)
    assert bound < 0.97 * len(arrivals)  # so much a Poisson stream takes from anybody
    assert 0.985 * bound <= on_time <= bound


def test_without_admission_and_drop_the_same_load_collapses() -> None:
    """The comparison that makes the test above mean something: deadlines that the scheduler cannot see."""
    blind = [Arrival(one.at_ms, 1e9) for one in poisson(1.5 * CAPACITY, 4_000, SLO_MS, seed=3)]
    outcomes = simulate(blind, {"b": TAU}, {"b": CAP})
    late = sum(one.end_ms - one.arrival.at_ms > SLO_MS for one in outcomes)
    assert late / len(outcomes) > 0.9


def test_times_of_a_device_slower_than_believed_still_serve_on_time_what_they_serve() -> None:
    arrivals = poisson(1.5 * CAPACITY, 4_000, SLO_MS, seed=5)
    slower = {"b": Tau(18.7, 4.73, 5.42)}
    _, on_time = goodput(simulate(arrivals, {"b": TAU}, {"b": CAP}, truth=slower))
    assert on_time >= 0.99


def test_polite_tenant_keeps_its_service_beside_a_flooder() -> None:
    flood = poisson(2 * CAPACITY, 8_000, SLO_MS, seed=1, tenant="flood")
    polite = poisson(20.0, 400, SLO_MS, seed=2, tenant="polite")
    both = sorted(flood + polite, key=lambda one: one.at_ms)
    outcomes = simulate(both, {"b": TAU}, {"b": CAP})
    mine = [one for one in outcomes if one.arrival.tenant == "polite" and one.arrival.at_ms < flood[-1].at_ms]
    assert sum(one.is_on_time for one in mine) >= 0.95 * len(mine)


def test_tenants_share_the_device_by_what_their_work_took_not_by_what_was_believed() -> None:
    """Of two models one takes twice as long as believed: its tenant gets half as many pictures."""
    works = [Arrival(0.0, 1e8, bucket, bucket) for bucket in ("slow", "fast") for _ in range(400)]
    believed, truth = Tau(0.0, 0.0, 10.0), {"slow": Tau(0.0, 0.0, 20.0), "fast": Tau(0.0, 0.0, 10.0)}
    outcomes = simulate(works, {"slow": believed, "fast": believed}, {"slow": 4, "fast": 4}, truth=truth)
    until = max(one.end_ms for one in outcomes if one.arrival.bucket == "fast")
    slow = sum(one.end_ms <= until for one in outcomes if one.arrival.bucket == "slow")
    assert 0.45 <= slow / 400 <= 0.55


def test_images_are_served_beside_a_backlog_of_videos_and_videos_get_their_share() -> None:
    videos = [Arrival(0.0, 1e8, "v:long") for _ in range(40)]
    images = poisson(0.9 * CAPACITY, 20_000, 20_000.0, seed=7, bucket="i")
    taus = {"v:long": Tau(0.0, 0.0, 2_000.0), "i": TAU}
    outcomes = simulate(videos + images, taus, {"v:long": 1, "i": CAP}, num_workers=2)
    waits = [one.end_ms - one.arrival.at_ms for one in outcomes if one.arrival.bucket == "i"]
    assert statistics.quantiles(waits, n=100)[98] < 200.0
    assert sum(one.fate == "done" for one in outcomes if one.arrival.bucket == "v:long") == 40


def test_one_device_gives_long_work_its_share_and_no_more() -> None:
    videos = [Arrival(0.0, 1e8, "v:long") for _ in range(60)]
    images = [Arrival(0.0, 1e8, "i") for _ in range(2_000)]
    taus = {"v:long": Tau(0.0, 0.0, 400.0), "i": TAU}
    outcomes = simulate(videos + images, taus, {"v:long": 1, "i": CAP}, admission=False)
    until = max(one.end_ms for one in outcomes if one.arrival.bucket == "i")
    long_ms = 400.0 * sum(one.end_ms <= until for one in outcomes if one.arrival.bucket == "v:long")
    assert 0.2 <= long_ms / until <= 0.3


def test_nothing_starves_behind_urgent_work() -> None:
    """A job that can wait long is due in the end, and then goes before whatever comes later."""
    patient = Arrival(0.0, 3_000.0)
    urgent = poisson(1.5 * CAPACITY, 3_000, SLO_MS, seed=9)
    outcomes = simulate([patient, *urgent], {"b": TAU}, {"b": CAP})
    assert next(one for one in outcomes if one.arrival is patient).is_on_time


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
def test_mean_latency_is_below_inoues_bound(load: float) -> None:
    tau = Tau(0.0, 10.0, 5.0)
    arrivals = poisson(1000 * load / tau.row_ms, 10_000, 1e9, seed=11)
    outcomes = simulate(arrivals, {"b": tau}, {"b": 500}, admission=False)
    mean = statistics.fmean(one.end_ms - one.arrival.at_ms for one in outcomes)
    bound = mean_latency_bound(load / tau.row_ms, tau)
    assert 0.65 * bound <= mean <= 1.02 * bound


def test_equal_seeds_give_equal_results() -> None:
    runs = [
        simulate(poisson(200, 500, SLO_MS, seed=1), {"b": TAU}, {"b": CAP}, noise=0.1, seed=2)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


STEP_MS, STEPS = 96.0, 4


def image_p99(load: float, *, videos: int, num: int = 8_000) -> float:
    """The 99 % point of the pictures' latency in ms on one device, beside back-to-back videos of 4 steps or none."""
    arrivals = [Arrival(0.0, 1e9, "v:long") for _ in range(videos)]
    images = poisson(load * CAPACITY, num, 1e6, seed=5, bucket="i")
    taus = {"v:long": Tau(0.0, 0.0, STEPS * STEP_MS), "i": TAU}
    outcomes = simulate(arrivals + images, taus, {"v:long": 1, "i": CAP}, steps={"v:long": STEPS})
    end = images[-1].at_ms
    assert videos == 0 or max(one.end_ms for one in outcomes if one.arrival.bucket == "v:long") > end
    waits = [one.end_ms - one.arrival.at_ms for one in outcomes if one.arrival.bucket == "i"]
    return statistics.quantiles(waits, n=1000)[989]


@pytest.mark.parametrize("load", [0.2, 0.5])
def test_videos_back_to_back_raise_the_images_p99_by_at_most_one_step(load: float) -> None:
    alone, beside = image_p99(load, videos=0), image_p99(load, videos=700)
    assert alone + 0.5 * STEP_MS < beside <= alone + STEP_MS, (alone, beside)


def test_videos_that_gave_the_device_away_only_at_their_ends_would_raise_it_by_more() -> None:
    """The planted fault: the same work in one step."""
    arrivals = [Arrival(0.0, 1e9, "v:long") for _ in range(300)]
    images = poisson(0.5 * CAPACITY, 8_000, 1e6, seed=5, bucket="i")
    taus = {"v:long": Tau(0.0, 0.0, STEPS * STEP_MS), "i": TAU}
    outcomes = simulate(arrivals + images, taus, {"v:long": 1, "i": CAP})
    waits = [one.end_ms - one.arrival.at_ms for one in outcomes if one.arrival.bucket == "i"]
    assert statistics.quantiles(waits, n=100)[98] > image_p99(0.5, videos=0) + 2 * STEP_MS
