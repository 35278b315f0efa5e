"""What a broker, or another client through it, can do to us: cost us its own messages, and no more."""

from __future__ import annotations

import threading
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from tars_mqtt import ConnectError, MQTTClient
from tests.support import ScriptedBroker, eventually, packet
from tests.support.observer import Observer
from tests.support.packet import PacketType, Property

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import ScriptedConnection

VERSIONS = ("5", "3.1.1")
MIB = 1 << 20


def served(*messages: Callable[[int], bytes]) -> Callable[[ScriptedConnection], None]:
    """A broker that answers the first SUBSCRIBE and sends these, made for its version, right behind."""

    def play(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        connection.send(*(message(connection.level) for message in messages))
        connection.serve()

    return play


def message(topic: str, payload: bytes, **options) -> Callable[[int], bytes]:
    return lambda level: packet.publish(topic, payload, level=level, **options)


# -- size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", VERSIONS)
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_message_that_is_too_large_costs_nothing_but_itself(
    make_client, shared_broker, unique, protocol, qos
) -> None:
    """Those behind it arrive on the same connection, the broker's window included."""
    received: list[bytes] = []
    client = make_client(shared_broker.url, protocol=protocol, max_payload_bytes=1000)
    client.subscribe(f"{unique}/#", received.append, qos)
    client.connect()
    with Observer(shared_broker.host, shared_broker.port) as other:
        for number in range(30):
            other.publish(f"{unique}/large", b"x" * 300_000)
            other.publish(f"{unique}/large", b"x" * 1001)
            other.publish(f"{unique}/small", b"%d" % number)
    eventually(lambda: received == [b"%d" % number for number in range(30)])
    # A broker of MQTT 5 keeps to itself what is above our Maximum Packet Size.
    assert client.stats().dropped == {"max_payload_bytes": 30 if protocol == "5" else 60}
    assert client.stats().reconnects == 0


@pytest.mark.parametrize("protocol", VERSIONS)
def test_a_message_that_is_too_large_is_not_held(make_client, protocol, caplog) -> None:
    """It goes by in pieces, is acknowledged, and named in one warning; also if the broker of MQTT 5 lies."""
    size, piece = 40 * MIB, b"x" * 65_536

    def play(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        head = packet.publish("evil\n\x1b[2J", b"", qos=1, packet_id=7, level=connection.level)[2:]
        connection.send(b"\x32", packet._variable(len(head) + size), head)
        for _ in range(size // len(piece)):
            connection.send(piece)
        connection.send(packet.publish("a", b"here", level=connection.level))
        assert connection.expect(PacketType.PUBACK).packet_id == 7
        connection.serve()

    received: list[bytes] = []
    with ScriptedBroker(play) as broker:
        client = make_client(broker.url, protocol=protocol, max_payload_bytes=MIB)
        client.subscribe("#", received.append)
        tracemalloc.start()
        try:
            client.connect()
            eventually(lambda: received == [b"here"], 30)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        broker.wait_for(PacketType.PUBACK)
        assert client.stats().dropped == {"max_payload_bytes": 1}
        assert client.stats().reconnects == 0
    assert peak < 5 * MIB
    assert (
        "dropped 1 messages larger than max_payload_bytes, the last of them on 'evil\\n\\x1b[2J'"
        in caplog.text
    )


def test_a_broker_of_mqtt_5_is_told_how_large_a_packet_may_be(make_client) -> None:
    with ScriptedBroker(lambda connection: (connection.accept(), connection.serve())) as broker:
        make_client(broker.url, "limited", max_payload_bytes=MIB).connect()
        make_client(broker.url, "unlimited", max_payload_bytes=268_435_455).connect()
        asked = [packet.read_connect(connect).properties for connect in broker.received(PacketType.CONNECT)]
    (limit,) = asked[0][Property.MAXIMUM_PACKET_SIZE]
    assert MIB < limit < MIB + 200_000
    assert Property.MAXIMUM_PACKET_SIZE not in asked[1]


# -- a broker that breaks the rules -------------------------------------------------------------------


def test_a_control_packet_without_end_is_refused() -> None:
    """paho would make objects of all its properties, on the network thread."""
    endless = packet.connack(level=5, properties={Property.USER_PROPERTY: [("", "")] * 60_000})

    def play(connection: ScriptedConnection) -> None:
        connection.expect(PacketType.CONNECT)
        connection.send(endless)
        connection.hold()

    with ScriptedBroker(play) as broker:
        client = MQTTClient(broker.url, "c", protocol="5", reconnect_min_delay=0.1)
        with pytest.raises(ConnectError, match="sent a packet of type 2 that is too large"):
            client.connect(timeout=2)


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(packet.publish("a", b"", qos=1, packet_id=1, level=5), id="one packet id for ever"),
        pytest.param(packet.pubrec(20_000), id="PUBREC that nobody asked for"),
    ],
)
def test_a_flood_that_fills_the_memory_ends_the_connection(flood, caplog) -> None:
    """The broker reads no answers, or opens ever new messages: both are bounded, and nobody hangs."""
    released = threading.Event()

    def play(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        while True:
            connection.send(flood * 1000)

    def calm(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.serve()

    with ScriptedBroker(play, calm) as broker:
        client = MQTTClient(broker.url, "c", protocol="5", reconnect_min_delay=0.1, shutdown_timeout=1.0)
        client.subscribe("a", lambda _: released.wait(30), 1)
        try:
            client.connect()
            eventually(lambda: client.stats().reconnects and client.connected, 30)
        finally:
            released.set()
            client.shutdown()
    assert "the broker has more messages" in caplog.text or "the broker does not read" in caplog.text
