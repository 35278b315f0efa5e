"""Delays between connection attempts: they grow, they are jittered, and they start over."""

from __future__ import annotations

import random

import pytest

from tars_mqtt._core.backoff import Backoff


def highest(_: float, ceiling: float) -> float:
    return ceiling


def lowest(floor: float, _: float) -> float:
    return floor


def test_the_ceiling_doubles_from_the_minimum_to_the_maximum() -> None:
    backoff = Backoff(1.0, 10.0, highest)
    assert [backoff.next() for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_the_jitter_is_full() -> None:
    """From zero to the ceiling: a fleet that lost its broker together does not come back together."""
    backoff = Backoff(1.0, 10.0, lowest)
    assert [backoff.next() for _ in range(3)] == [0.0, 0.0, 0.0]
    backoff = Backoff(8.0, 8.0, random.Random(1).uniform)
    delays = [backoff.next() for _ in range(200)]
    assert 0 <= min(delays) < 1
    assert 7 < max(delays) <= 8


def test_reset_starts_again_from_the_minimum() -> None:
    backoff = Backoff(1.0, 60.0, highest)
    backoff.next()
    backoff.next()
    assert backoff.attempt == 2
    backoff.reset()
    assert backoff.attempt == 0
    assert backoff.next() == 1.0


def test_an_outage_of_years_overflows_nothing() -> None:
    backoff = Backoff(0.1, 60.0, highest)
    backoff.attempt = 100_000_000
    assert backoff.next() == 60.0


@pytest.mark.parametrize(("uniform", "expected"), [(lowest, 30.0), (highest, 60.0)])
def test_the_longest_delay_is_long_and_jittered(uniform, expected: float) -> None:
    backoff = Backoff(1.0, 60.0, uniform)
    assert backoff.longest() == expected
    assert backoff.attempt == 1


def test_the_ceiling_is_what_the_next_delay_cannot_exceed() -> None:
    backoff = Backoff(1.0, 60.0, highest)
    for _ in range(10):
        ceiling = backoff.ceiling
        assert backoff.next() == ceiling
