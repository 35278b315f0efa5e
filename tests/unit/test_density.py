"""When the network thread waits for more packets to gather, and when it does not."""

from __future__ import annotations

import pytest

from tars_mqtt._core.density import Density

MILLISECOND = 0.001


def pauses(rounds: list[int], every: float) -> list[float]:
    """How long each of some looks at the connection waits, when they come with these packets, in this time."""
    density = Density()
    density.pause(0.0)
    waits = []
    for number, packets in enumerate(rounds, 1):
        density.note(packets)
        waits.append(density.pause(number * every))
    return waits


def test_dense_traffic_is_left_to_gather():
    """Many packets at a time, many times in a millisecond: from then on each look waits a little."""
    waits = pauses([8] * 20, MILLISECOND / 4)
    assert waits[:3] == [0.0] * 3
    assert all(0 < wait < MILLISECOND for wait in waits[4:])


@pytest.mark.parametrize("packets", [1, 2])
def test_a_dialogue_never_waits(packets):
    """One message at a time and its answer: it may be as fast as can be, and no look at it waits."""
    assert not any(pauses([packets] * 1_000, MILLISECOND / 100))


def test_thin_traffic_never_waits():
    """Bursts with long pauses between them are handed over at once."""
    assert not any(pauses([10] * 20, MILLISECOND * 10))


def test_waiting_ends_with_the_density():
    """The first look after a silence does not wait, however dense traffic was before."""
    density = Density()
    for number in range(1, 11):
        density.note(8)
        waited = density.pause(number * MILLISECOND / 4)
    assert waited
    density.note(8)
    assert not density.pause(1.0)
