"""What a broker, or another client through it, can do to us: cost us its own messages, and no more."""

from __future__ import annotations

import contextlib
import json
import logging
import tracemalloc
from typing import TYPE_CHECKING

import attrs
import pytest

from tars_mqtt import (
    ConnectError,
    Envelope,
    EnvelopeLogFilter,
    MQTTClient,
    PublishRejectedError,
    SubscribeError,
)
from tars_mqtt._core import session
from tests.support import ScriptedBroker, eventually, packet
from tests.support.observer import Observer
from tests.support.packet import PacketType, Property

if TYPE_CHECKING:
    from tests.support import ScriptedConnection

SHOWN = ("message", "topic", "event_type", "envelope_id", "correlation_id")
VERSIONS = ("5", "3.1.1")
MIB = 1 << 20


def calm(connection: ScriptedConnection) -> None:
    connection.accept()
    connection.serve()


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
            eventually(lambda: received == [b"here"])
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
    with ScriptedBroker(calm) as broker:
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


def test_a_broker_that_wants_answers_and_reads_none_is_left(make_client, monkeypatch, caplog) -> None:
    """They would fill our memory, one for each of its packets."""
    monkeypatch.setattr(session, "_MOST_UNSENT_PACKETS", 10_000)
    flood = packet.pubrec(20_000) * 1000

    def play(connection: ScriptedConnection) -> None:
        connection.accept()
        while True:
            connection.send(flood)

    with ScriptedBroker(play, calm) as broker:
        client = make_client(broker.url, protocol="5")
        client.connect()
        eventually(lambda: client.stats().reconnects and client.connected)
        client.shutdown(1.0)
    assert "the broker does not read the answers" in caplog.text


# -- what reaches a log -------------------------------------------------------------------------------

EVIL = "a\r\n2026-01-01 ERROR all is lost\x1b[2J\u2028\x9b31m"
FORGERIES = {
    Property.REASON_STRING: EVIL,
    Property.USER_PROPERTY: [(EVIL, EVIL)],
}


@attrs.define
class Expected:
    number: int


def evil_envelope() -> bytes:
    return json.dumps(
        {"id": EVIL, "type": EVIL, "ts": 1.0, "source": EVIL, "data": {EVIL: EVIL}, "correlation_id": EVIL}
    ).encode()


def with_properties(body: bytes, *codes: int) -> bytes:
    return body + packet._properties(packet.V5, FORGERIES) + bytes(codes)


def test_nothing_that_others_wrote_reaches_a_log_unescaped(make_client, caplog) -> None:
    """Topics, ids, types, reason strings, server references, user properties: one record stays one line."""

    def wants_another(data: Expected) -> None: ...

    def raises(event: Envelope) -> None:
        logging.getLogger("mine").warning("failing")
        raise ValueError

    def play(connection: ScriptedConnection) -> None:
        connection.accept(properties=FORGERIES)
        subscribed = [connection.expect(PacketType.SUBSCRIBE) for _ in range(3)]
        kind = PacketType.SUBACK
        for number, asked in enumerate(subscribed):
            code = 0x87 if number == 2 else 0
            connection.send(packet.packet(kind, 0, with_properties(asked.body[:2], code)))
        for topic in (f"wants/{EVIL}", f"raises/{EVIL}", f"nobody/{EVIL}"):
            connection.send(
                packet.publish(
                    topic, evil_envelope(), level=5, properties={Property.USER_PROPERTY: [(EVIL, EVIL)]}
                )
            )
        connection.send(packet.publish(f"wants/{EVIL}", b"\xff", level=5))
        connection.send(packet.publish(f"wants/{EVIL}", b"x" * 2000, level=5))
        sent = packet.read_publish(connection.expect(PacketType.PUBLISH), 5)
        refusal = sent.packet_id.to_bytes(2) + b"\x87"
        connection.send(packet.packet(PacketType.PUBACK, 0, with_properties(refusal)))
        connection.send(packet.disconnect(0x9C, properties=FORGERIES | {Property.SERVER_REFERENCE: EVIL}))

    def nonsense(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.send(packet.packet(PacketType.SUBACK, 0, EVIL.encode()))

    def refusal(connection: ScriptedConnection) -> None:
        connection.expect(PacketType.CONNECT)
        properties = FORGERIES | {Property.SERVER_REFERENCE: EVIL}
        connection.send(packet.connack(0x9D, level=5, properties=properties))

    caplog.set_level("DEBUG")
    caplog.handler.addFilter(EnvelopeLogFilter())
    with ScriptedBroker(play, nonsense, refusal, calm) as broker:
        client = make_client(broker.url, protocol="5", max_payload_bytes=1000)
        client.subscribe("wants/#", wants_another)
        client.subscribe("raises/#", raises)
        client.subscribe("shut/#", raises)
        with contextlib.suppress(SubscribeError):
            client.connect()
        with contextlib.suppress(PublishRejectedError):
            client.publish("a", b"", qos=1, timeout=3)
        eventually(lambda: len(broker.connections) > 3)
        eventually(lambda: client.stats().decode_failures == 2 and client.stats().handler_failures == 1)
        client.shutdown(1.0)
    ours = [record for record in caplog.records if record.name.startswith(("tars_mqtt", "mine"))]
    said = [
        " | ".join(str(value) for name, value in vars(record).items() if name in SHOWN) for record in ours
    ]
    assert sum("all is lost" in line for line in said) >= 5, said
    assert not [line for line in said if not line.isprintable()]
