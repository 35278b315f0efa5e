"""A broker that sends what the standard forbids: it costs one connection, and nothing else."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.support import ConnectionEnded, PacketType, ScriptedBroker, accept_and_serve, eventually
from tests.support import packet as mqtt
from tests.support.packet import V5, V311

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import ScriptedConnection


def publish_with_properties(properties: bytes, *, length: int | None = None, qos: int = 0) -> bytes:
    """An MQTT 5 PUBLISH with these raw *properties*, and the *length* that it says they have."""
    said = len(properties) if length is None else length
    identifier = b"\x00\x01" if qos else b""
    return mqtt.packet(
        PacketType.PUBLISH, qos << 1, b"\x00\x01a" + identifier + bytes([said]) + properties + b"x"
    )


def malformed(level: int) -> dict[str, bytes]:
    """What no broker may send, in the words in which the test names it."""
    good = mqtt.publish("a", b"x", qos=1, packet_id=1, level=level)
    topic = mqtt.publish("aa", b"x", level=level)
    packets = {
        # the fixed header
        "remaining length of five bytes": b"\x30\xff\xff\xff\xff\x01",
        "remaining length without an end": b"\x30" + b"\xff" * 40,
        "a reserved type": b"\x00\x00",
        "QoS 3": bytes([good[0] | 0x06]) + good[1:],
        "DUP without QoS": bytes([topic[0] | 0x08]) + topic[1:],
        "flags on PUBACK": b"\x41\x02\x40\x00",
        "PUBREL without its flag": b"\x60\x02\x00\x01",
        "flags on SUBACK": b"\x92\x03\x00\x01\x00",
        "flags on PINGRESP": b"\xd1\x00",
        # PUBLISH
        "a wildcard in the topic": mqtt.publish("a/#", b"x", level=level),
        "the other wildcard": mqtt.publish("+/b", b"x", level=level),
        "an empty topic": mqtt.publish("", b"x", level=level),
        "a topic that is not UTF-8": topic.replace(b"aa", b"\xff\xfe"),
        "a topic with half a surrogate pair": mqtt.publish("aaa", b"x", level=level).replace(
            b"aaa", b"\xed\xa0\x80"
        ),
        "a topic that is overlong UTF-8": topic.replace(b"aa", b"\xc0\xaf"),
        "U+0000 in the topic": mqtt.publish("a\0b", b"x", level=level),
        "a topic longer than the packet": b"\x30\x03\xff\xff\x61",
        "a PUBLISH of no bytes": b"\x30\x00",
        "a PUBLISH without its packet id": b"\x32\x03\x00\x01a",
        "packet id 0": mqtt.publish("a", b"x", qos=1, packet_id=0, level=level),
        # acknowledgements
        "PUBACK of one byte": b"\x40\x01\x00",
        "PUBACK of packet id 0": b"\x40\x02\x00\x00",
        "PUBREC of no bytes": b"\x50\x00",
        "PUBREL of one byte": b"\x62\x01\x00",
        "SUBACK of one byte": b"\x90\x01\x00",
        "UNSUBACK of one byte": b"\xb0\x01\x00",
        # a second CONNACK, and packets of the wrong direction
        "a second CONNACK": mqtt.connack(level=level),
        "CONNECT": mqtt.connect("you", level=level),
        "SUBSCRIBE": mqtt.subscribe(1, ("a", 0), level=level),
        "UNSUBSCRIBE": mqtt.packet(PacketType.UNSUBSCRIBE, 2, b"\x00\x01\x00\x01a"),
        "PINGREQ": mqtt.pingreq(),
        "an HTTP answer": b"HTTP/1.1 400 Bad Request\r\n\r\n",
        "zeros": bytes(64),
    }
    if level == V5:
        packets |= {
            "properties that end inside a value": publish_with_properties(b"\x02\x00\x00"),
            "properties longer than the packet": publish_with_properties(b"\x01\x00", length=100),
            "a property length without an end": mqtt.packet(
                PacketType.PUBLISH, 0, b"\x00\x01a" + b"\xff" * 5 + b"x"
            ),
            "an unknown property": publish_with_properties(b"\x7e\x00"),
            "a property that does not belong here": publish_with_properties(b"\x13\x00\x0a"),
            "a property twice": publish_with_properties(b"\x01\x00\x01\x00"),
            "subscription identifier 0": publish_with_properties(b"\x0b\x00"),
            "a user property that is not UTF-8": publish_with_properties(b"\x26\x00\x01k\x00\x01\xff"),
            "PUBACK whose properties do not fill it": b"\x40\x06\x40\x00\x00\x05\x1f\x00",
            "AUTH": b"\xf0\x00",
        }
    else:
        packets |= {
            "PUBACK of three bytes": b"\x40\x03\x40\x00\x00",
            "AUTH": b"\xf0\x00",
        }
    return packets


@pytest.mark.parametrize(("protocol", "level"), [("5", V5), ("3.1.1", V311)])
def test_a_malformed_packet_costs_one_connection(
    make_client, at_once: None, protocol: str, level: int, caplog
) -> None:
    """Each of them: what came right before it is handled, it is in the log, and the next connection works."""
    received: list[bytes] = []

    def spoil(what: str, packet: bytes) -> Callable[[ScriptedConnection], None]:
        def script(connection: ScriptedConnection) -> None:
            connection.accept()
            connection.answer(connection.expect(PacketType.SUBSCRIBE))
            connection.send(mqtt.publish("a", what.encode(), level=level), packet)
            with contextlib.suppress(ConnectionEnded):
                connection.hold()
            left.append(what)

        return script

    left: list[str] = []
    cases = malformed(level)
    with ScriptedBroker(*(spoil(*case) for case in cases.items()), accept_and_serve) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.subscribe("a", received.append)
        client.connect()
        eventually(
            lambda: client.stats().connections == len(cases) + 1 and client.connected,
            30,
            lambda: f"it leaves after {list(cases)[len(left)]!r}",
        )
        client.publish("b", b"fine", qos=1)
        eventually(lambda: [payload.decode() for payload in received] == list(cases))
    lost = [record for record in caplog.records if "connection lost" in record.getMessage()]
    assert len(lost) >= len(cases)
    assert "internal error" not in caplog.text


def test_malformed_packets_again_and_again_are_no_storm(make_client) -> None:
    """A broker that is broken for good is tried with growing delays, and events wait."""

    def spoil(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.send(b"\x00\x00")
        connection.hold()

    with ScriptedBroker(spoil) as broker:
        client = make_client(broker.url, reconnect_max_delay=30)
        client.connect()
        receipt = client.submit_event("a", "n", 1, qos=1)
        eventually(lambda: client.stats().connections >= 4)
        assert len(broker.connections) < 20
        assert not receipt.done()


# -- strange, but allowed -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_length_of_256_megabytes_takes_no_memory_until_it_comes(make_client, protocol: str) -> None:
    def promise(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.send(b"\x30\xff\xff\xff\x7f" + b"x" * 1000)
        connection.hold()

    with ScriptedBroker(promise) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.connect()
        eventually(lambda: client.stats().bytes_in > 1000)
        assert client.connected


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_the_standard_allows_is_no_reason_to_leave(make_client, protocol: str) -> None:
    """A PINGRESP that nobody asked for, an empty payload, a long topic, a length with a byte to spare."""
    received: list[bytes] = []
    long_topic = "a/" + "x" * 60_000

    def script(connection: ScriptedConnection) -> None:
        connection.accept()
        connection.answer(connection.expect(PacketType.SUBSCRIBE))
        plain = mqtt.publish("a/b", b"1", level=connection.level)
        connection.send(
            mqtt.pingresp(),
            mqtt.publish("a/b", b"", level=connection.level),
            mqtt.publish(long_topic, b"2", level=connection.level),
            plain[:1] + bytes([plain[1] | 0x80, 0]) + plain[2:],
            mqtt.pubrel(999),
            mqtt.unsuback(999, [0], level=connection.level),
        )
        connection.serve()

    with ScriptedBroker(script) as broker:
        client = make_client(broker.url, protocol=protocol)
        client.subscribe("a/#", received.append)
        client.connect()
        eventually(lambda: received == [b"", b"2", b"1"])
        client.publish("b", b"fine", qos=1)
        assert client.stats().connections == 1
