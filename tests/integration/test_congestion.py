"""More comes in than handlers manage: reading stops, and nothing depends on what is not read."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import ConnectionState, Message
from tars_mqtt._core.transport import Transport
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import Broker

VERSIONS = ("5", "3.1.1")
FEW = 15
MANY = 150
"""Messages, several times what may be pending. Mosquitto keeps neither to our Receive Maximum nor to its own window
as soon as we acknowledge or publish something ourselves."""


@pytest.fixture
def generous(make_broker: Callable[..., Broker]) -> Broker:
    return make_broker(["max_queued_messages 0", "max_inflight_messages 0"])


def feed(make_client, broker: Broker) -> None:
    other = make_client(broker.url, "other")
    other.connect()
    for number in range(MANY):
        other.publish("in", b"%d" % number, qos=1)


@pytest.mark.parametrize("protocol", VERSIONS)
def test_dead_letters_are_acknowledged_while_too_much_is_pending(make_client, generous, protocol) -> None:
    """The broker's answer to a dead letter stands behind the messages that wait for it."""
    client = make_client(generous.url, protocol=protocol, max_pending=FEW)

    def fail(_: bytes) -> None:
        raise ValueError

    client.subscribe("in", fail, 1, dead_letter="dead")
    client.connect()
    feed(make_client, generous)
    eventually(lambda: client.stats().dead_letters == MANY)


@pytest.mark.parametrize("protocol", VERSIONS)
def test_a_handler_publishes_while_too_much_is_pending(make_client, generous, protocol) -> None:
    client = make_client(generous.url, protocol=protocol, max_pending=FEW, workers=4)
    answers: list[bytes] = []

    def answer(message: Message) -> None:
        client.publish("out", message.payload, qos=1)

    client.subscribe("in", answer, 1)
    client.subscribe("out", answers.append, 1)
    client.connect()
    feed(make_client, generous)
    eventually(lambda: answers == [b"%d" % number for number in range(MANY)])
    assert client.stats().handler_failures == 0


def test_a_handler_subscribes_while_too_much_is_pending(make_client, generous) -> None:
    client = make_client(generous.url, protocol="3.1.1", max_pending=FEW)
    handled: list[bytes] = []

    def subscribe(message: Message) -> None:
        with client.subscribe(f"more/{message.payload.decode()}", lambda _: None):
            handled.append(message.payload)

    client.subscribe("in", subscribe, 1)
    client.connect()
    feed(make_client, generous)
    eventually(lambda: len(handled) == MANY)
    assert client.stats().handler_failures == 0


def test_a_broker_that_dies_is_missed_though_nothing_is_read(make_client, generous) -> None:
    """Its goodbye stands behind what is not read."""
    client = make_client(
        generous.url, protocol="3.1.1", max_pending=FEW, keepalive=600, heartbeat_interval=600
    )
    blocked = threading.Event()
    try:
        client.subscribe("in", lambda _: blocked.wait(60) and None, 1)
        client.connect()
        feed(make_client, generous)
        transport: Transport = getattr(client, "unwrapped", client)._engine._session.transport
        eventually(lambda: transport._paused)
        generous.kill()
        eventually(lambda: client.state is ConnectionState.RECONNECTING)
        generous.start()
        eventually(lambda: client.state is ConnectionState.CONNECTED)
    finally:
        blocked.set()


def test_a_goodbye_to_a_frozen_broker_waits_asleep(make_client, generous, monkeypatch) -> None:
    """Also when something else happens meanwhile."""
    looks = 0
    select = Transport._select

    def count(self: Transport, timeout: float) -> bool:
        nonlocal looks
        looks += 1
        return select(self, timeout)

    client = make_client(generous.url, shutdown_timeout=1.0)
    client.connect()
    generous.freeze()
    for _ in range(40):
        client.publish("a", b"x" * 400_000, timeout=5)
    monkeypatch.setattr(Transport, "_select", count)
    leaving = threading.Thread(target=client.disconnect, daemon=True)
    leaving.start()
    eventually(lambda: looks > 0)
    getattr(client, "unwrapped", client)._engine._session.transport.wake()
    leaving.join(30)
    assert looks < 200


def test_what_an_earlier_process_subscribed_to_does_not_fill_the_window_for_good(
    make_client, broker: Broker
) -> None:
    """Nobody takes it any more: it is acknowledged at once when that is known, not when something else is due."""
    settings = {"client_id": "heir", "session_expiry": 60, "keepalive": 600, "max_pending": 5}
    earlier = make_client(broker.url, **settings)
    earlier.subscribe("old", lambda payload: None, 1)
    earlier.connect()
    earlier.disconnect()
    received: list[bytes] = []
    heir = make_client(broker.url, **settings)
    heir.subscribe("new", received.append, 1)
    heir.connect()
    boss = make_client(broker.url)
    boss.connect()
    for number in range(20):
        boss.publish("old", b"%d" % number, qos=1)
    boss.publish("new", b"new", qos=1)
    eventually(lambda: received == [b"new"])
    assert heir.stats().dropped["no_handler"] == 20
