"""Whose turn it is on a device: the decision, and the lock that follows it, on a clock that the test moves."""

import threading
from collections.abc import Callable

import pytest

from flashbulb_service.scheduler import LONG, SHORT
from flashbulb_service.turns import Shares, Turn, Turns, next_lane

BOTH = (SHORT, LONG)


def test_who_waits_alone_is_next_whatever_was_used() -> None:
    used = Shares(short_ms=0.0, long_ms=1e6, last=LONG)
    assert next_lane([LONG], used) == LONG
    assert next_lane([SHORT], Shares(short_ms=1e6)) == SHORT
    assert next_lane([], used) is None


def test_short_work_goes_first_until_long_work_is_owed_its_quarter() -> None:
    assert next_lane(BOTH, Shares()) == SHORT
    assert next_lane(BOTH, Shares(short_ms=300.0, long_ms=100.0, last=SHORT)) == SHORT
    assert next_lane(BOTH, Shares(short_ms=301.0, long_ms=100.0, last=SHORT)) == LONG


def test_long_work_never_has_two_turns_in_a_row_while_short_work_waits() -> None:
    assert next_lane(BOTH, Shares(short_ms=1e6, long_ms=0.0, last=LONG)) == SHORT


def test_a_saturated_device_is_shared_one_to_three_by_time_whatever_a_turn_takes() -> None:
    shares, now, used = Shares(), 0.0, {SHORT: 0.0, LONG: 0.0}
    for _ in range(10_000):
        lane = next_lane(BOTH, shares)
        assert lane is not None
        ms = 90.0 if lane == LONG else 20.0
        now += ms
        used[lane] += ms
        shares = shares.charged(lane, ms, now)
    assert 0.24 <= used[LONG] / now <= 0.26


def test_long_work_that_begins_has_no_claim_on_the_time_before_it_came() -> None:
    busy = Shares(short_ms=30_000.0, last=SHORT)
    assert next_lane(BOTH, busy) == LONG
    assert next_lane(BOTH, busy.levelled()) == SHORT
    ahead = Shares(short_ms=1.0, long_ms=500.0)
    assert ahead.levelled() == ahead


def test_what_was_used_fades() -> None:
    later = Shares(short_ms=800.0, long_ms=400.0, at_ms=0.0).charged(SHORT, 0.0, 120_000.0)
    assert (later.short_ms, later.long_ms) == pytest.approx((200.0, 100.0))


class Device:
    """Turns with a log of who ran, each batch on a thread of its own."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.ran: list[str] = []
        self.threads: list[threading.Thread] = []

    def start(self, lane: str, work: Callable[[Turn], None]) -> threading.Event:
        """Run work in a place of its own; return what is set when the place is taken."""
        entered = threading.Event()

        def run() -> None:
            with self.turns.enter(lane) as turn:
                entered.set()
                work(turn)

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        assert entered.wait(10)
        return entered

    def join(self) -> None:
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


def test_short_work_that_came_during_a_step_runs_before_the_next_one() -> None:
    device, begun, go = Device(), threading.Event(), threading.Event()

    def video(turn: Turn) -> None:
        with turn:
            begun.set()
            assert go.wait(10)
            device.ran.append("step 1")
            with turn.given_way():
                pass
            device.ran.append("step 2")

    def image(turn: Turn) -> None:
        with turn:
            device.ran.append("image")

    device.start(LONG, video)
    assert begun.wait(10)
    device.start(SHORT, image)
    go.set()
    device.join()
    assert device.ran == ["step 1", "image", "step 2"]


def test_long_work_waits_for_short_work_that_is_on_its_way_but_not_for_ever() -> None:
    now = [0.0]
    turns, ready = Turns(lambda: now[0]), threading.Event()
    order: list[str] = []

    def image() -> None:
        with turns.enter(SHORT) as turn:
            assert ready.wait(10)  # its text is being encoded
            with turn:
                order.append("image")

    with turns.enter(LONG) as turn, turn:
        order.append("step 1")
        thread = threading.Thread(target=image)
        with turn.given_way():
            turns.expect_short(within_s=100.0)
            thread.start()
            ready.set()
        order.append("step 2")
        thread.join(10)
        with turn.given_way():
            turns.expect_short(within_s=1.0)
            now[0] = 2.0  # nobody came
        order.append("step 3")
    assert order == ["step 1", "image", "step 2", "step 3"]


def test_time_in_which_a_turn_gave_way_is_not_held() -> None:
    now = [0.0]
    turns = Turns(lambda: now[0])
    with turns.enter(LONG) as turn, turn:
        now[0] = 1.0
        with turn.given_way():
            now[0] = 5.0
        now[0] = 5.5
    assert turn.held_ms == pytest.approx(1500.0)


def test_a_batch_that_fails_leaves_its_place() -> None:
    turns = Turns()
    with pytest.raises(RuntimeError, match="broken"), turns.enter(SHORT):
        raise RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"), turns.enter(LONG) as turn, turn:
        raise RuntimeError("broken")
    with turns.enter(LONG) as turn, turn:
        pass  # nobody is waited for
