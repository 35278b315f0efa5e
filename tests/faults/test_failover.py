"""Several brokers: the last good one first, the others in turn, and no message between two stools."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import ConnectError
from tests.support import (
    Broker,
    FaultProxy,
    PacketType,
    ScriptedBroker,
    accept_and_leave,
    accept_and_serve,
    eventually,
    numbers,
)
from tests.support import packet as mqtt
from tests.support.port import HOST, free_port
from tests.support.wait import connect_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import ScriptedConnection


def test_the_last_good_broker_is_asked_first(make_client) -> None:
    """A first one that refuses is not asked at each reconnect."""

    def refuse(connection: ScriptedConnection) -> None:
        connection.accept(0x88)

    with (
        ScriptedBroker(refuse) as first,
        ScriptedBroker(accept_and_leave, accept_and_leave, accept_and_serve) as second,
    ):
        client = make_client(f"{first.url},{second.url}", protocol="5")
        client.connect()
        eventually(lambda: client.stats().connections == 3 and client.connected)
        assert (len(first.connections), len(second.connections)) == (1, 3)


@pytest.mark.parametrize("down", ["refused", "silent", "hangs up", "bad credentials"])
def test_a_broker_that_is_no_use_is_passed_over(make_client, broker: Broker, down: str) -> None:
    """At the first connection, and with a subscription and an event."""
    received: list[bytes] = []
    with ExitStack() as stack:
        scripts: dict[str, Callable[[ScriptedConnection], object]] = {
            "silent": lambda connection: connection.hold(),
            "hangs up": lambda connection: None,
            "bad credentials": lambda connection: connection.accept(0x86),
        }
        url = (
            stack.enter_context(ScriptedBroker(scripts[down])).url
            if down in scripts
            else f"mqtt://{HOST}:{free_port()}"
        )
        client = make_client(f"{url},{broker.url}", connect_timeout=0.5)
        client.subscribe("a", received.append, 1)
        client.connect(timeout=10)
        client.publish_event("a", "n", 1, qos=1)
        eventually(lambda: numbers(received) == [1])
        client.shutdown()


def test_brokers_are_tried_in_turn(make_client, make_broker: Callable[..., Broker]) -> None:
    """The second takes over when the first dies; subscriptions and queue come along."""
    first, second = make_broker(), make_broker()
    received: list[bytes] = []
    client = make_client(f"{first.url},{second.url}")
    client.subscribe("a", received.append, 1)
    client.connect()
    first.kill()
    eventually(lambda: not client.connected)
    client.publish_event("a", "n", 1, qos=1)
    eventually(lambda: numbers(received) == [1])
    assert "New client connected" in second.log
    second.kill()
    first.start()
    eventually(lambda: client.stats().connections == 3 and client.connected)
    client.publish_event("a", "n", 2, qos=1)
    eventually(lambda: numbers(received) == [1, 2])


def test_the_error_names_every_broker_that_was_tried(make_client) -> None:
    ports = free_port(), free_port()
    client = make_client(",".join(f"mqtt://{HOST}:{port}" for port in ports))
    connect_error(client, *map(str, ports))


@pytest.mark.parametrize("protocol", ["auto", "5", "3.1.1"])
@pytest.mark.parametrize(("setting", "timeout"), [(4, None), (60, 4)])
def test_a_broker_that_is_silent_leaves_time_for_the_next(
    make_client, make_broker: Callable[..., Broker], protocol: str, setting: float, timeout: float
) -> None:
    """Of what ``connect_timeout`` gives, or whoever waits in `connect`."""
    silent, second = make_broker(), make_broker()
    silent.freeze()
    try:
        client = make_client(f"{silent.url},{second.url}", protocol=protocol, connect_timeout=setting)
        client.connect(timeout)
    finally:
        silent.thaw()
    assert "New client connected" in second.log


def test_the_error_names_every_broker_that_was_silent(make_client) -> None:
    with socket.create_server((HOST, 0)) as first, socket.create_server((HOST, 0)) as second:
        urls = [f"mqtt://{HOST}:{server.getsockname()[1]}" for server in (first, second)]
        client = make_client(",".join(urls), connect_timeout=0.5)
        with pytest.raises(ConnectError) as caught:
            client.connect()
    for url in urls:
        assert url in str(caught.value)


def test_what_was_under_way_goes_to_the_next_broker_as_new(make_client) -> None:
    """The second broker has never heard of it, and of the subscriptions neither: no DUP, and SUBSCRIBE."""

    def swallow(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        connection.send(
            *(
                answer(mqtt.read_publish(connection.expect(PacketType.PUBLISH), connection.level).packet_id)
                for answer in (mqtt.puback, mqtt.pubrec)
            )
        )
        assert {connection.read().type for _ in range(2)} == {PacketType.PUBREL, PacketType.PUBLISH}

    def refuse(connection: ScriptedConnection) -> None:
        connection.accept(0x88)

    def other(connection: ScriptedConnection) -> None:
        # It has a session under our name, of another day.
        connection.accept(session_present=True)
        connection.serve()

    with ScriptedBroker(swallow, refuse) as first, ScriptedBroker(other) as second:
        client = make_client(f"{first.url},{second.url}", protocol="5")
        client.subscribe("a", print, 1)
        client.connect()
        client.submit_event("b", "n", 0, qos=1)
        receipts = [client.submit_event("b", "n", number, qos=qos) for number, qos in ((1, 2), (2, 1))]
        for receipt in receipts:
            receipt.result(20)
        publishes = [mqtt.read_publish(packet, 5) for packet in second.received(PacketType.PUBLISH)]
        assert [publish.dup for publish in publishes] == [False, False]
        assert numbers(publish.payload for publish in publishes) == [1, 2]
        assert len(second.received(PacketType.SUBSCRIBE)) == 1


def test_brokers_that_fail_in_turn_lose_nothing_that_was_accepted(
    make_client, make_broker: Callable[..., Broker]
) -> None:
    """One is always up; a publisher goes from one to the other, in the middle of its work."""
    brokers = [make_broker(), make_broker()]
    with ExitStack() as stack:
        ways = [stack.enter_context(FaultProxy(broker.url)) for broker in brokers]
        listeners = [make_client(broker.url) for broker in brokers]
        received: list[bytes] = []
        for listener in listeners:
            listener.subscribe("a", received.append, 1)
            listener.connect()
        publisher = make_client(",".join(way.url for way in ways))
        publisher.connect()
        receipts = []
        for turn in range(4):
            receipts += [
                publisher.submit_event("a", "n", number, qos=1) for number in range(turn * 50, turn * 50 + 50)
            ]
            connections = publisher.stats().connections
            down, up = ways[turn % 2], ways[1 - turn % 2]
            up.accept()
            down.refuse()
            down.cut()
            eventually(lambda: publisher.stats().connections > connections and publisher.connected)  # noqa: B023
        for receipt in receipts:
            receipt.result(20)
        eventually(lambda: set(numbers(received)) == set(range(200)))
        publisher.shutdown()
