"""A warning about something that lasts comes now and then, with the count of what it stands for."""

from __future__ import annotations

from tars_mqtt._core.throttle import Throttle
from tests.support import FakeClock


def test_the_first_is_reported_at_once() -> None:
    assert Throttle(5.0, FakeClock()).admit() == 1
    assert Throttle(5.0, FakeClock(now=0.0)).admit(3) == 3


def test_within_the_interval_all_are_held_back_and_counted() -> None:
    clock = FakeClock()
    throttle = Throttle(5.0, clock)
    assert throttle.admit() == 1
    clock.advance(4.9)
    assert throttle.admit() == 0
    assert throttle.admit(10) == 0
    clock.advance(0.1)
    assert throttle.admit() == 12


def test_the_interval_begins_with_each_report() -> None:
    clock = FakeClock()
    throttle = Throttle(5.0, clock)
    throttle.admit()
    clock.advance(7.0)
    assert throttle.admit() == 1
    clock.advance(4.0)
    assert throttle.admit() == 0
    clock.advance(1.0)
    assert throttle.admit() == 2
