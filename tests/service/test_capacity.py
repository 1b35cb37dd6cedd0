"""The planner against arithmetic and queueing theory; the work that a queue holds."""

import math
from importlib import import_module
from pathlib import Path

import pytest

from flashbulb_service import capacity
from flashbulb_service.capacity import Plan, parse_ms, parse_rate, plan_workers, work_seconds
from flashbulb_service.errors import InvalidRequest
from flashbulb_service.timing import Tau

TAU = Tau(floor_ms=17.0, base_ms=4.3, row_ms=4.93, margin=1.2)
CAPACITY = 8 / TAU(8) * 1000  # per second of one worker in batches of eight


def test_each_worker_added_is_needed() -> None:
    plans = plan_workers(TAU, 8, rate_per_s=3 * CAPACITY, p99_ms=80.0, requests=6000)
    assert [plan.is_enough for plan in plans] == [False] * (len(plans) - 1) + [True]
    assert plans[0].workers == 3  # fewer cannot keep up, whatever the objective
    assert plans[-1].workers == 4


@pytest.mark.parametrize("needed", [3, 4, 40, 41, 100, 511, 512])
def test_one_worker_fewer_than_planned_is_not_enough(needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large fleets grew by an eighth at a time, and the first that was enough was the answer: 41 for 40."""
    monkeypatch.setattr(capacity, "simulate", lambda *_, num_workers, **__: num_workers)
    monkeypatch.setattr(
        capacity,
        "_summarise",
        lambda _, __, workers, ___: Plan(workers, 0.5, 8.0, 50.0, 80.0, 1.0 if workers >= needed else 0.9),
    )
    plans = plan_workers(TAU, 8, rate_per_s=3 * CAPACITY, p99_ms=80.0)
    assert [plan.workers for plan in plans if plan.is_enough] == [needed]
    assert needed == 3 or plans[-2].workers == needed - 1  # fewer than 3 cannot keep up


def test_busy_share_is_the_load_at_its_batch_size() -> None:
    """Far below capacity a batch has hardly more than one row, and Little's law gives the busy share."""
    rate = 2.0
    plan = plan_workers(TAU, 8, rate_per_s=rate, p99_ms=500.0, noise=0.0, requests=20_000)[-1]
    assert plan.workers == 1
    assert plan.busy == pytest.approx(rate * 0.017, rel=0.05)
    assert 1.0 <= plan.mean_batch < 1.1
    assert plan.p50_ms == pytest.approx(17.0 + 10.0, rel=0.05)


def test_a_tighter_objective_never_needs_fewer_workers() -> None:
    needed = [
        plan_workers(TAU, 8, rate_per_s=2 * CAPACITY, p99_ms=p99, requests=6000)[-1].workers
        for p99 in (1000.0, 200.0, 90.0)
    ]
    assert needed == sorted(needed)
    assert needed[0] < needed[-1]


def test_an_objective_below_one_picture_is_refused_with_the_least_possible() -> None:
    with pytest.raises(InvalidRequest, match="at least 30 ms"):
        plan_workers(TAU, 8, rate_per_s=1.0, p99_ms=25.0)


def test_a_rate_beyond_every_fleet_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="512 workers"):
        plan_workers(TAU, 8, rate_per_s=1e6, p99_ms=300.0)


def test_waiting_work_takes_the_best_batch_and_a_second_where_nothing_is_known() -> None:
    work = work_seconds({"emoji@1": 12, "new@1": 3}, {"emoji@1": {1: 10.0, 4: 20.0, 8: 48.0}})
    assert work == {"emoji@1": pytest.approx(12 * 0.005), "new@1": 3.0}


@pytest.mark.parametrize(
    ("text", "expected"), [("20/s", 20.0), ("20", 20.0), ("900/min", 15.0), ("7200/h", 2.0)]
)
def test_rates(text: str, expected: float) -> None:
    assert parse_rate(text) == pytest.approx(expected)


@pytest.mark.parametrize(("text", "expected"), [("300ms", 300.0), ("1.5s", 1500.0), ("250", 250.0)])
def test_times(text: str, expected: float) -> None:
    assert parse_ms(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "fast", "0/s", "-1/s", "20/day", "inf", "nan"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a value such as 20/s"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["", "soon", "0ms", "3 hours", "infs"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a value such as 300ms"):
        parse_ms(text)


def test_one_worker_without_batches_is_the_queue_of_the_textbook() -> None:
    """M/D/1: Erlang's distribution of the wait, P(W <= t) = (1 - r) sum_k (-l(t - kD))^k / k! e^(l(t - kD))."""
    service_ms, load = 10.0, 0.7
    rate = load / service_ms

    def at_most(t: float) -> float:
        terms = range(int(t // service_ms) + 1)
        left = [(k, rate * (t - k * service_ms)) for k in terms]
        return (1 - load) * math.fsum((-x) ** k / math.factorial(k) * math.exp(x) for k, x in left)

    low, high = 0.0, 20 * service_ms
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(middle) < 0.99 else (low, middle)
    tau = Tau(floor_ms=service_ms, base_ms=0.0, row_ms=0.0, margin=1.0)
    (plan,) = plan_workers(
        tau, 1, rate_per_s=1000 * rate, p99_ms=10_000.0, overhead_ms=3.0, noise=0.0, requests=30_000
    )
    assert plan.p99_ms == pytest.approx(low + service_ms + 3.0, rel=0.05)
    assert plan.busy == pytest.approx(load, rel=0.02)


GOOD = {
    "planned": {"is_enough": True},
    "same_arrivals": {"share_on_time": 0.995, "p99_ms": 100.0},
    "measured": {"share_on_time": 0.992, "p99_ms": 105.0, "invalid": []},
}
FEWER = {
    "planned": {"is_enough": False},
    "same_arrivals": {"share_on_time": 0.95, "p99_ms": 150.0},
    "measured": {"share_on_time": 0.94, "p99_ms": 155.0, "invalid": []},
}


@pytest.mark.parametrize(
    ("planted", "part"),
    [
        ({"measured": {"share_on_time": 0.975, "p99_ms": 105.0, "invalid": []}}, "planned_is_enough"),
        ({"planned": {"is_enough": False}}, "fewer_is_not"),
        ({"measured": {"share_on_time": 0.992, "p99_ms": 140.0, "invalid": []}}, "p99_follows"),
        ({"same_arrivals": {"share_on_time": 0.9, "p99_ms": 100.0}}, "share_follows"),
        ({"measured": {"share_on_time": 0.992, "p99_ms": 105.0, "invalid": ["late"]}}, "generator_kept_up"),
    ],
)
def test_a_planner_that_lies_spoils_the_benchmarks_verdict(
    planted: dict[str, object], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    benchmark = import_module("capacity")
    assert all(benchmark.judge([FEWER, GOOD], 0.15).values())
    verdict = benchmark.judge([FEWER, {**GOOD, **planted}], 0.15)
    assert [name for name, good in verdict.items() if not good] == [part]


def test_a_smaller_number_that_nobody_tried_is_not_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict over no measurement at all was good."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    verdict = import_module("capacity").judge([GOOD], 0.15)
    assert [name for name, good in verdict.items() if not good] == ["fewer_is_not"]
