"""A peer that fell silent is noticed in time, and only such a peer."""

from __future__ import annotations

import threading
import time

import pytest

from tars_mqtt import ConnectionState
from tests.support import FaultProxy, PacketType, ScriptedBroker, eventually
from tests.support import packet as mqtt
from tests.support.packet import Property

SLACK = 1.5
"""Seconds that a busy machine may take on top of a promised time."""


def seconds_until_noticed(client, patience: float) -> float:
    """How long the client goes on believing in its connection."""
    started = time.monotonic()
    eventually(lambda: client.state is ConnectionState.RECONNECTING, patience + SLACK)
    return time.monotonic() - started


def test_a_frozen_broker_is_noticed_within_one_and_a_half_keepalives(make_client, broker):
    """And found again when it thaws."""
    client = make_client(broker.url, keepalive=2, connect_timeout=1.0)
    client.connect()
    broker.freeze()
    try:
        assert seconds_until_noticed(client, 3.0) > 1.0
        assert "no sign of life" in client.stats().last_error
    finally:
        broker.thaw()
    assert client.wait_connected(10)


def test_with_heartbeat_a_frozen_broker_is_noticed_within_three_intervals(make_client, broker):
    """Whichever comes first: the keepalive alone would take 90 s."""
    client = make_client(broker.url, keepalive=60, enable_heartbeat=True, heartbeat_interval=1.0)
    client.connect()
    broker.freeze()
    try:
        seconds_until_noticed(client, 3.0)
    finally:
        broker.thaw()


@pytest.mark.parametrize("direction", ["to_broker", "to_client", None])
def test_a_blackholed_link_is_noticed(make_client, shared_broker, direction):
    """No end, no reset, nothing: in one direction or in both."""
    with FaultProxy(shared_broker.url) as proxy:
        client = make_client(proxy.url, keepalive=1)
        client.connect()
        proxy.stall(direction)
        seconds_until_noticed(client, 1.5)
        proxy.resume()
        assert client.wait_connected(10)
        client.shutdown()


def test_a_busy_sender_notices_as_well(make_client, shared_broker, unique):
    """What we send is no sign of life, and what the broker does not acknowledge fills no memory."""
    with FaultProxy(shared_broker.url) as proxy:
        client = make_client(proxy.url, keepalive=1)
        client.connect()
        proxy.stall("to_client")
        started = time.monotonic()
        while client.connected and time.monotonic() < started + 1.5 + SLACK:
            client.submit_event(unique, "tick", None, qos=1)
            time.sleep(0.01)
        assert client.state is ConnectionState.RECONNECTING
        client.shutdown(timeout=0.1)


def test_an_idle_connection_that_lives_is_kept(make_client, broker):
    """It is asked for a sign of life, and the round trip is measured."""
    client = make_client(broker.url, keepalive=1)
    client.connect()
    assert client.stats().ping_round_trip is None
    time.sleep(2.5)
    assert client.connected
    stats = client.stats()
    assert stats.reconnects == 0
    assert 0 < stats.ping_round_trip < 1.0
    assert "PINGREQ" in broker.log


def test_the_keepalive_that_the_broker_asks_for_counts(make_client):
    """Server Keep Alive of MQTT 5: the broker would hang up on a client that keeps to its own."""

    def script(connection) -> None:
        connection.accept(properties={Property.SERVER_KEEP_ALIVE: 1})
        connection.serve()

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, keepalive=600)
        client.connect()
        broker.wait_for(PacketType.PINGREQ, 2, timeout=3.0)
        client.shutdown()


def test_a_broker_too_busy_sending_to_answer_pings_is_alive(make_client):
    """Any byte is a sign of life."""
    talk = threading.Event()

    def script(connection) -> None:
        connection.accept()
        while not talk.wait(0.2):
            connection.send(mqtt.publish("a", b"", level=mqtt.V5))

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, keepalive=1)
        client.connect()
        time.sleep(2.0)
        assert client.stats().reconnects == 0
        talk.set()
        client.shutdown()


def test_handlers_that_take_their_time_do_not_cost_the_connection(make_client, broker):
    """All workers are busy for longer than the broker would wait for a ping."""
    release = threading.Event()
    client = make_client(broker.url, keepalive=1, workers=1)
    client.subscribe("a", lambda _: release.wait(10), 1)
    client.connect()
    for _ in range(5):
        client.publish("a", b"", qos=1)
    time.sleep(2.0)
    assert client.connected
    assert client.stats().reconnects == 0
    release.set()
    eventually(lambda: client.stats().handled == 5)
