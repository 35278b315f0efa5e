"""`Deadlines`: of several who wait for the same, the one with the least time counts."""

from __future__ import annotations

import threading

from tars_mqtt._core.deadline import Deadlines
from tests.support import eventually


def test_the_first_deadline_counts_as_long_as_somebody_has_it() -> None:
    deadlines = Deadlines()
    with deadlines.within(100):
        assert 99 < deadlines.left() <= 100
        with deadlines.within(10):
            assert 9 < deadlines.left() <= 10
            assert 7 < deadlines.left(reserves=2) <= 8, "a tenth of the time for each of the last steps"
        assert 99 < deadlines.left() <= 100


def test_a_wait_is_over_when_what_is_waited_for_is_there() -> None:
    deadlines = Deadlines()
    there = threading.Event()
    with deadlines.within(100):
        threading.Timer(0.05, there.set).start()
        assert deadlines.wait(there.wait)


def test_a_wait_ends_with_the_time_of_whoever_comes_with_less() -> None:
    deadlines = Deadlines()
    outcome: list[bool] = []

    def wait_for_ever() -> None:
        with deadlines.within(1e6):
            outcome.append(deadlines.wait(threading.Event().wait))

    waiting = threading.Thread(target=wait_for_ever, daemon=True)
    waiting.start()
    eventually(lambda: deadlines._deadlines)
    with deadlines.within(0):
        waiting.join(10)
    assert outcome == [False]


def test_what_is_there_already_needs_no_time() -> None:
    deadlines = Deadlines()
    with deadlines.within(0):
        assert deadlines.wait(lambda _: True)
