"""The scheduling decisions and the time model, as pure functions."""

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flashbulb_service.scheduler import (
    LONG,
    BucketFacts,
    BucketWindow,
    Scheduler,
    Waiting,
    Window,
    bucket_name,
    fair_fill,
    form_batch,
    halves,
    lane_of,
    open_lane,
    plan_batch,
)
from flashbulb_service.timing import LearnedCap, Tau, TimeModel, fit_tau

TAU = Tau(17.0, 4.3, 4.93, margin=1.2)


def row(name: str, due_ms: float, tenant: str = "t", *, hard: bool = True, **fields) -> Waiting:
    return Waiting(name, tenant, due_ms, due_ms if hard else None, **fields)


def ids(rows) -> list[str]:
    return [one.id for one in rows]


@pytest.mark.parametrize("true", [TAU, Tau(0.0, 43.0, 49.0), Tau(20.0, 0.0, 5.0), Tau(50.0, 0.0, 0.0)])
def test_a_known_curve_is_recovered(true: Tau) -> None:
    fitted = fit_tau({size: true(size) for size in (1, 2, 3, 4, 6, 8, 16)})
    assert [fitted(size) for size in range(1, 17)] == pytest.approx([true(s) for s in range(1, 17)], rel=0.03)


def test_one_size_promises_no_speed_that_was_never_seen() -> None:
    tau = fit_tau({4: 40.0})
    assert (tau(1), tau(4), tau(8)) == (40.0, 40.0, 80.0)
    for points in ({}, {0: 1.0}, {1: 0.0}, {1: math.nan}):
        with pytest.raises(ValueError, match="positive milliseconds"):
            fit_tau(points)


@given(st.dictionaries(st.integers(1, 64), st.floats(1e-3, 1e6), min_size=1, max_size=8))
@example({2: 10.0, 4: 40.0})
def test_no_batch_takes_no_time_however_noisy_the_measurements(points) -> None:
    tau = fit_tau(points)
    assert all(tau(size) > 0 for size in range(1, 65))


@given(st.lists(st.tuples(st.integers(1, 16), st.floats(0.1, 1e5)), max_size=60))
def test_a_time_model_survives_every_series_of_batches(batches) -> None:
    model = TimeModel({1: 17.0, 8: 43.74})
    for size, ms in batches:
        model.observe(size, ms)
        assert model.tau(size) > 0


def test_measurements_replace_a_wrong_calibration_and_outliers_do_not_matter() -> None:
    model = TimeModel({1: 8.5, 8: 21.87})  # half of what the device takes
    draws = random.Random(1)
    for i in range(200):
        size = draws.choice([1, 2, 4, 8])
        model.observe(size, 5_000.0 if i % 10 == 0 else TAU(size) * math.exp(draws.gauss(0, 0.05)))
    assert model.tau is not None
    assert [model.tau(size) for size in (1, 2, 4, 8)] == pytest.approx(
        [TAU(size) for size in (1, 2, 4, 8)], rel=0.08
    )
    assert 1.5 < model.drift < 2.2


def test_margin_is_what_the_measured_noise_asks_for() -> None:
    draws = random.Random(2)
    noisy, calm = TimeModel({1: 17.0, 8: 43.74}), TimeModel({1: 17.0, 8: 43.74})
    for _ in range(200):
        noisy.observe(8, TAU(8) * math.exp(draws.gauss(0, 0.1)))
        calm.observe(8, TAU(8))
    assert noisy.tau and 1.1 < noisy.tau.margin < 1.3
    assert calm.tau and calm.tau.margin == pytest.approx(1.0)


def test_knee_is_where_more_rows_gain_nothing() -> None:
    assert Tau(0.0, 0.0, 10.0).knee(8) == 1
    assert Tau(40.0, 0.0, 10.0).knee(8) == 4
    assert TAU.knee(8, share=0.9) == 4


def test_learnt_cap_halves_at_once_and_recovers_slowly() -> None:
    cap = LearnedCap(8)
    cap.out_of_memory(8)
    assert cap.rows == 4
    for _ in range(LearnedCap.RECOVERY):
        cap.passed(4)
    assert cap.rows == 5
    cap.out_of_memory(1)
    assert cap.rows == 1


def test_earliest_due_rows_are_chosen() -> None:
    rows = [row(str(due), due) for due in (400, 100, 300, 200)]
    batch, dropped = form_batch(rows, 0.0, BucketFacts(2, TAU), {})
    assert (ids(batch), dropped) == (["100", "200"], [])


def test_row_that_would_be_late_in_the_full_batch_is_dropped() -> None:
    rows = [row("late", 20.0), *(row(f"r{i}", 60.0 + i) for i in range(12))]
    batch, dropped = form_batch(rows, 0.0, BucketFacts(8, TAU), {})
    assert ids(dropped) == ["late"]
    assert len(batch) == 8


def test_tight_row_runs_in_a_smaller_batch_when_that_costs_nobody_else() -> None:
    rows = [row("tight", 21.0), *(row(f"r{i}", 1000.0) for i in range(5))]
    batch, dropped = form_batch(rows, 0.0, BucketFacts(8, TAU), {})
    assert "tight" in ids(batch) and dropped == [] and TAU.safe(len(batch)) <= 21.0


def test_rows_without_a_deadline_are_never_dropped() -> None:
    batch, dropped = form_batch([row("old", -1e6, hard=False)], 0.0, BucketFacts(8, TAU), {})
    assert (ids(batch), dropped) == (["old"], [])


def test_suspect_runs_alone_and_others_run_without_it() -> None:
    first = [row("s", 1e4, is_suspect=True), row("a", 2e4), row("b", 3e4)]
    assert ids(form_batch(first, 0.0, BucketFacts(8, TAU), {})[0]) == ["s"]
    second = [row("s", 9e4, is_suspect=True), row("a", 2e4), row("b", 3e4)]
    assert ids(form_batch(second, 0.0, BucketFacts(8, TAU), {})[0]) == ["a", "b"]


def test_a_suspect_takes_nobodys_place_in_a_batch_it_is_not_in() -> None:
    rows = [row("a", 2e4), row("s", 3e4, is_suspect=True), row("b", 4e4), row("c", 5e4)]
    assert ids(form_batch(rows, 0.0, BucketFacts(3), {})[0]) == ["a", "b", "c"]


def window(*buckets: BucketWindow, **fields) -> Window:
    return Window(0.0, buckets, **fields)


def bucket(name: str, *rows: Waiting) -> BucketWindow:
    return BucketWindow("m", name, rows, len(rows))


def test_bucket_with_the_least_slack_goes_first_and_ties_go_to_the_better_throughput() -> None:
    urgent, calm = bucket("u", row("u", 200.0)), bucket("c", row("c", 900.0))
    plan = plan_batch(window(calm, urgent), lambda _m, _b: BucketFacts(8, TAU))
    assert plan and plan.bucket == "u"
    full = bucket("f", *(row(f"f{i}", 226.74) for i in range(8)))  # slack 183 ms, as that of u
    plan = plan_batch(window(urgent, full), lambda _m, _b: BucketFacts(8, TAU))
    assert plan and plan.bucket == "f" and plan.predicted_ms == pytest.approx(TAU(8))


def test_cold_model_waits_while_a_warm_one_has_work_unless_it_must_start() -> None:
    def facts(_model: str, name: str) -> BucketFacts:
        return BucketFacts(8, TAU, swap_ms=500.0 if name == "cold" else 0.0)

    warm = bucket("warm", row("w", 2_000.0))
    plan = plan_batch(window(warm, bucket("cold", row("c", 1_000.0))), facts)
    assert plan and plan.bucket == "warm"
    plan = plan_batch(window(warm, bucket("cold", row("c", 530.0, hard=False))), facts)
    assert plan and plan.bucket == "cold"


def test_nothing_waiting_is_no_plan_and_only_hopeless_rows_is_a_plan_to_drop() -> None:
    assert plan_batch(window(), lambda _m, _b: BucketFacts(8, TAU)) is None
    plan = plan_batch(window(bucket("b", row("x", 1.0))), lambda _m, _b: BucketFacts(8, TAU))
    assert plan and (plan.take, plan.drop) == ((), ("x",))


def test_long_lane_never_holds_all_of_several_workers() -> None:
    long = bucket(bucket_name("m", 64, 64, 1, "long"), row("v", 1e6))
    assert lane_of(long.bucket) == "long"
    assert open_lane(window(long, num_workers=1)) is None
    assert open_lane(window(long, num_workers=2)) is None
    assert open_lane(window(long, num_workers=2, num_long=1)) == "short"
    assert open_lane(window(long, num_workers=8, num_long=1)) is None
    assert plan_batch(window(long, num_workers=2, num_long=1), lambda _m, _b: BucketFacts(8)) is None


def test_a_model_that_left_between_look_and_decision_is_left_alone() -> None:
    seen = Window(0.0, (BucketWindow("m", "m:64x64:1", (row("a", 100.0),), 1),))
    scheduler = Scheduler()
    scheduler.add("m", 4, {1: 10.0, 4: 20.0})
    plan = scheduler.plan(seen)
    assert plan is not None and plan.take == ("a",)
    scheduler.forget("m")
    assert scheduler.plan(seen) is None
    scheduler.out_of_memory("m", "m:64x64:1", 4)
    assert scheduler.observe("m", "m:64x64:1", 1, 10.0) is None


rows_of_tenants = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 1000), st.booleans()), min_size=1, max_size=30
)


@given(rows_of_tenants, st.integers(1, 10), st.floats(0, 200))
def test_every_row_is_run_dropped_or_left_and_a_batch_keeps_its_deadlines(drawn, cap, now) -> None:
    rows = [row(f"{i}", due, tenant, hard=hard) for i, (tenant, due, hard) in enumerate(drawn)]
    batch, dropped = form_batch(rows, now, BucketFacts(cap, TAU), {})
    assert len(batch) <= cap and not set(ids(batch)) & set(ids(dropped))
    assert batch or len(dropped) == len(rows)
    assert all(one.deadline_ms is not None for one in dropped)
    end = now + TAU.safe(len(batch)) if batch else now
    assert all(one.deadline_ms is None or one.deadline_ms >= end for one in batch)


@given(rows_of_tenants, st.integers(1, 10))
def test_fair_fill_keeps_tenants_within_a_quantum_and_a_row(drawn, num) -> None:
    rows = [row(f"{i}", due, tenant) for i, (tenant, due, _) in enumerate(drawn)]
    chosen = fair_fill(rows, num, {}, lambda _row: 10.0, 25.0)
    assert len(chosen) == min(num, len(rows))
    left = {one.tenant for one in rows if one not in chosen}
    used = {tenant: 10.0 * sum(one.tenant == tenant for one in chosen) for tenant in "abc"}
    assert all(used[mine] <= used[other] + 35.0 for mine in "abc" for other in left)


@given(st.lists(st.integers(), min_size=2, max_size=9))
def test_halves_keep_every_row_and_are_smaller(rows) -> None:
    first, second = halves(rows)
    assert first + second == rows and first and second


def test_a_calibration_tells_only_of_its_own_number_of_steps() -> None:
    scheduler = Scheduler()
    scheduler.add("m@1", 4, {1: 10.0, 4: 25.0}, num_steps=1)
    assert scheduler.facts("m@1", bucket_name("m@1", 64, 64, 1)).tau is not None
    four = bucket_name("m@1", 64, 64, 4, LONG)
    assert scheduler.facts("m@1", four).tau is None
    scheduler.observe("m@1", four, 1, 40.0)
    tau = scheduler.facts("m@1", four).tau
    assert tau is not None and tau(1) == 40.0
