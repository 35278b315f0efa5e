"""Over which message a broker hangs up: found where there is one, and nothing given up where there is none."""

from __future__ import annotations

import pytest

from tars_mqtt._core.outgoing import Outgoing
from tars_mqtt._core.suspicion import Suspicion
from tars_mqtt.message import PublishReceipt
from tests.support.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def suspicion(clock: FakeClock) -> Suspicion:
    suspicion = Suspicion(clock)
    suspicion.new_connection()
    return suspicion


def message(size: int = 500) -> Outgoing:
    return Outgoing(b"t", b"x" * (size - 1), 1, False, PublishReceipt("id", "t", 1))


def suspected(suspicion: Suspicion) -> Outgoing:
    """A message that was in flight when a connection ended."""
    suspect = message()
    assert suspicion.may_send(suspect, others_in_flight=True)
    suspicion.sent(suspect)
    assert suspicion.hung_up([suspect]) is None
    suspicion.new_connection()
    return suspect


def sent_alone(suspicion: Suspicion, suspect: Outgoing, clock: FakeClock) -> None:
    suspicion.answered()
    if not suspicion.may_send(suspect, others_in_flight=False):
        clock.advance(1.0)
        assert not suspicion.may_send(suspect, others_in_flight=False), "an answer from now is needed"
        suspicion.answered()
    assert suspicion.may_send(suspect, others_in_flight=False)
    suspicion.sent(suspect)


def test_four_hang_ups_over_one_message_condemn_it(suspicion: Suspicion, clock: FakeClock) -> None:
    suspect = suspected(suspicion)
    for verdict in (None, None, suspect):
        sent_alone(suspicion, suspect, clock)
        assert suspicion.hung_up([suspect]) is verdict
        suspicion.new_connection()


def test_a_suspect_waits_for_an_answer_on_the_new_connection(suspicion: Suspicion) -> None:
    """A connection that never carried anything says nothing about a message."""
    suspect = suspected(suspicion)
    assert not suspicion.may_send(suspect, others_in_flight=False)
    assert suspicion.wants_answer
    suspicion.answered()
    assert not suspicion.wants_answer
    assert suspicion.may_send(suspect, others_in_flight=False)


def test_a_network_that_breaks_each_connection_soon_condemns_nobody(
    suspicion: Suspicion, clock: FakeClock
) -> None:
    """However often: at the last tries the connection has to hold for a while first."""
    suspect = suspected(suspicion)
    sent_alone(suspicion, suspect, clock)
    assert suspicion.hung_up([suspect]) is None
    for _ in range(10):
        suspicion.new_connection()
        suspicion.answered()
        assert not suspicion.may_send(suspect, others_in_flight=False)
        assert clock.now < suspicion.look_again_at <= clock.now + 1.0
        clock.advance(0.1)
        assert suspicion.hung_up([]) is None
    assert suspect.strikes == 2


def test_connections_that_end_without_an_answer_condemn_nobody(suspicion: Suspicion) -> None:
    suspect = suspected(suspicion)
    for _ in range(10):
        assert not suspicion.may_send(suspect, others_in_flight=False)
        assert suspicion.hung_up([]) is None
        suspicion.new_connection()
    assert suspect.strikes == 1


def test_a_suspect_goes_alone(suspicion: Suspicion) -> None:
    suspect = suspected(suspicion)
    suspicion.answered()
    assert not suspicion.may_send(suspect, others_in_flight=True)
    suspicion.sent(suspect)
    assert not suspicion.may_send(message(1), others_in_flight=True), "nobody goes behind it"


def test_a_connection_that_ends_much_later_condemns_nobody(suspicion: Suspicion, clock: FakeClock) -> None:
    """A long message on a slow link is under way for a while, and links break at any time."""
    suspect = suspected(suspicion)
    for _ in range(10):
        sent_alone(suspicion, suspect, clock)
        clock.advance(6.0)
        assert suspicion.hung_up([suspect]) is None
        suspicion.new_connection()


def test_an_acknowledged_size_is_above_suspicion(suspicion: Suspicion) -> None:
    suspicion.acknowledged(message(500))
    smaller = message(499)
    suspicion.sent(smaller)
    assert suspicion.hung_up([smaller]) is None
    assert smaller.strikes == 0
    suspicion.new_connection()
    assert suspicion.may_send(smaller, others_in_flight=True)


def test_a_suspect_that_arrives_lets_the_others_go(suspicion: Suspicion, clock: FakeClock) -> None:
    suspect = suspected(suspicion)
    sent_alone(suspicion, suspect, clock)
    suspicion.acknowledged(suspect)
    assert suspicion.may_send(message(1), others_in_flight=False)


def test_a_suspect_that_arrives_clears_those_of_its_size(suspicion: Suspicion, clock: FakeClock) -> None:
    """After an outage they leave side by side again, not one by one."""
    first, second = message(), message()
    assert suspicion.hung_up([first, second]) is None
    suspicion.new_connection()
    sent_alone(suspicion, first, clock)
    suspicion.acknowledged(first)
    assert suspicion.may_send(second, others_in_flight=True)
