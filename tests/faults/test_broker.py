"""A broker that is killed and one that is frozen: nothing is lost but what only a forgetful broker had."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import Broker, Traffic, eventually, numbers

if TYPE_CHECKING:
    from collections.abc import Callable


def test_kill_9_of_a_broker_that_remembers_loses_nothing(
    make_client, make_broker: Callable[..., Broker]
) -> None:
    """Twice; what it acknowledged, it has on disk, and what it did not, it is sent again."""
    broker = make_broker(persistence=True)
    traffic = Traffic(make_client, broker.url)
    for _ in range(2):
        traffic.publish(30)
        traffic.assert_nothing_is_lost()
        broker.kill()
        eventually(lambda: not traffic.publisher.connected)
        traffic.publish(30)
        broker.start()
        traffic.assert_nothing_is_lost()
    traffic.assert_order()


def test_kill_9_of_a_broker_that_forgets_loses_nothing_of_ours(make_client, broker: Broker) -> None:
    """In the middle of traffic: receipts come true, subscriptions are made again, nothing counts as repetition."""
    traffic = Traffic(make_client, broker.url)
    for _ in range(3):
        traffic.publish(100)
        broker.kill()
        traffic.publish(100)
        traffic.disturbed_by(broker.start)
        traffic.assert_settled()
        # It has taken messages when nobody had subscribed yet, which is the end of them.
        traffic.assert_nothing_is_lost(since=traffic.publish(50))
    assert "Received PUBLISH from publisher (d1" not in broker.log


@pytest.mark.parametrize("qos", [1, 2])
def test_a_frozen_broker_loses_nothing(make_client, broker: Broker, qos: int) -> None:
    """SIGSTOP: it is given up, and may well have had the messages. They come once more, or once with QoS 2."""
    traffic = Traffic(make_client, broker.url, keepalive=1)
    traffic.publish(5, qos)
    traffic.assert_nothing_is_lost()
    broker.freeze()
    traffic.publish(30, qos)
    eventually(lambda: not traffic.publisher.connected)
    broker.thaw()
    traffic.assert_nothing_is_lost()
    if qos == 2:
        assert traffic.receipts
        assert broker.log.count("Received PUBREL from publisher") >= len(traffic.receipts)


def test_a_broker_that_is_restarted_again_and_again_loses_nothing(
    make_client, make_broker: Callable[..., Broker]
) -> None:
    """In good order: it says goodbye in MQTT 5, hangs up in 3.1.1, and keeps what it had."""
    broker = make_broker(persistence=True)
    traffic = Traffic(make_client, broker.url, protocol="3.1.1")
    for _ in range(3):
        traffic.publish(50)
        traffic.disturbed_by(broker.restart)
        traffic.publish(50)
    traffic.assert_nothing_is_lost()
    traffic.assert_order()


def test_messages_for_a_listener_that_is_away_wait_at_the_broker(make_client, broker: Broker) -> None:
    """Its session is its own, and not a matter of who publishes."""
    traffic = Traffic(make_client, broker.url)
    traffic.listener.disconnect()
    traffic.publish(50)
    traffic.assert_settled()
    assert traffic.received == []
    traffic.listener.connect()
    eventually(lambda: len(traffic.received) == 50)
    assert numbers(traffic.received) == list(range(50))
