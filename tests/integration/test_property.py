"""The properties of MQTT 5: what a message takes along, and how long it is worth sending."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tars_mqtt import EncodeError, Message, PublishRejectedError
from tars_mqtt._core.wire import encode_varint
from tests.support import eventually, numbers
from tests.support import packet as mqtt
from tests.support.packet import PacketType

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import Broker

PROPERTIES: dict[str, Any] = {
    "content_type": "text/plain",
    "response_topic": "answers/here",
    "correlation_data": b"\x00\x01",
    "payload_format_indicator": 1,
    "message_expiry_interval": 60,
    "user_properties": [("trace", "1"), ("trace", "2")],
}


def without_identifiers(message: Message) -> dict[str, object]:
    return {name: value for name, value in message.properties.items() if name != "subscription_identifiers"}


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_all_that_is_published_may_have_properties(make_client, shared_broker, unique, qos) -> None:
    received: list[Message] = []

    def handle(message: Message) -> None:
        received.append(message)

    client = make_client(shared_broker.url)
    client.subscribe(f"{unique}/#", handle, 2)
    client.connect()
    client.publish(f"{unique}/a", "text", qos=qos, properties=PROPERTIES)
    client.publish_event(f"{unique}/b", "t", 1, qos=qos, properties=PROPERTIES)
    client.submit_event(f"{unique}/c", "t", 1, qos=qos, properties=PROPERTIES)
    client.publish(f"{unique}/d", "text", qos=qos)
    eventually(lambda: len(received) == 4)
    assert [without_identifiers(message) for message in received] == [PROPERTIES] * 3 + [{}]


def test_what_came_in_may_go_out_again(make_client, shared_broker, unique) -> None:
    """The broker's own additions to it do not."""
    received: list[Message] = []

    def forward(message: Message) -> None:
        client.publish(f"{unique}/out", message.payload, qos=1, properties=message.properties)

    def handle(message: Message) -> None:
        received.append(message)

    client = make_client(shared_broker.url)
    client.subscribe(f"{unique}/in", forward, 1)
    client.subscribe(f"{unique}/out", handle, 1)
    client.connect()
    client.publish(f"{unique}/in", "text", qos=1, properties=PROPERTIES)
    eventually(lambda: received)
    assert without_identifiers(received[0]) == PROPERTIES


def test_what_expires_while_the_broker_is_away_is_not_sent(make_client, broker: Broker) -> None:
    received: list[bytes] = []
    client = make_client(broker.url)
    client.subscribe("a", received.append, 1)
    client.connect()
    broker.kill()
    eventually(lambda: not client.connected)
    late = client.submit_event("a", "n", 1, qos=1, properties={"message_expiry_interval": 1})
    kept = client.submit_event("a", "n", 2, qos=1, properties={"message_expiry_interval": 600})
    with pytest.raises(TimeoutError):
        late.result(1.1)
    broker.start()
    with pytest.raises(PublishRejectedError, match="message_expiry_interval"):
        late.result(10)
    kept.result(10)
    eventually(lambda: received)
    assert numbers(received) == [2]


def test_properties_outlast_a_restart_in_the_outbox(make_client, broker: Broker, tmp_path: Path) -> None:
    """As they were given; of the expiry interval, what is left."""
    received: list[Message] = []

    def handle(message: Message) -> None:
        received.append(message)

    settings = {"outbox": str(tmp_path / "outbox.db")}
    first = make_client(broker.url, **settings)
    first.connect()
    broker.kill()
    eventually(lambda: not first.connected)
    short = {"message_expiry_interval": 1}
    receipts = [
        first.submit_event("a", "t", 1, qos=1, properties=given) for given in (PROPERTIES, short, None)
    ]
    with pytest.raises(TimeoutError):
        receipts[1].result(1.1)
    first.shutdown(timeout=0.1)
    broker.start()
    second = make_client(broker.url, **settings)
    second.subscribe("a", handle, 1)
    second.connect()
    eventually(lambda: len(received) == 2)
    kept, plain = map(without_identifiers, received)
    assert 0 < kept.pop("message_expiry_interval") < 60  # type: ignore[operator]
    assert kept == {name: value for name, value in PROPERTIES.items() if name != "message_expiry_interval"}
    assert plain == {}


def test_mqtt_311_leaves_them_out_and_says_so(make_client, shared_broker, unique, caplog) -> None:
    received: list[Message] = []

    def handle(message: Message) -> None:
        received.append(message)

    client = make_client(shared_broker.url, protocol="3.1.1")
    client.subscribe(unique, handle, 1)
    client.connect()
    with caplog.at_level(logging.WARNING, "tars_mqtt"):
        for _ in range(3):
            client.publish(unique, "text", qos=1, properties=PROPERTIES)
    eventually(lambda: len(received) == 3)
    assert received[0].properties == {}
    assert sum("without their properties" in record.message for record in caplog.records) == 1


def test_a_wrong_property_is_refused_before_anything_is_sent(make_client, shared_broker, unique) -> None:
    client = make_client(shared_broker.url)
    client.connect()
    for qos in (0, 1):
        with pytest.raises(EncodeError, match="properties.content_type must be a str"):
            client.publish(unique, "text", qos=qos, properties={"content_type": 7})
        with pytest.raises(EncodeError, match="no property 'expiry'"):
            client.publish_event(unique, "t", 1, qos=qos, properties={"expiry": 7})
    assert client.stats().messages_out == 0


@pytest.mark.parametrize(
    "properties",
    [
        b"\x08\0\3a/+",  # a response topic with a wildcard [MQTT-3.3.2-14]
        b"\x08\0\1#",
        b"\x08\0\0",  # and an empty one
        b"\x01\2",  # payload format indicator 2
        b"\x03\0\1\1",  # a control character
        b"\x03\0\3\xef\xbf\xbf",  # U+FFFF
        b"\x09\0\0",
        b"\x0b\1",  # a subscription identifier, which is the broker's to give [MQTT-3.3.4-6]
        b"\x23\0\1",  # a topic alias
        b"\x26\0\0\0\0",
        b"\x26\0\1a\0\1b" * 1_000,
    ],
)
def test_what_others_may_write_into_a_message_does_not_cost_its_readers_the_connection(
    make_client, broker: Broker, properties: bytes
) -> None:
    """It would come again, and again cost the connection."""
    received: list[bytes] = []
    client = make_client(broker.url)
    client.subscribe("a", received.append, 1)
    client.connect()
    with socket.create_connection(("127.0.0.1", broker.port)) as other:
        other.sendall(mqtt.connect("other", level=mqtt.V5))
        assert other.recv(4)[0] == PacketType.CONNACK << 4
        body = b"\0\1a" + b"\0\1" + encode_varint(len(properties)) + properties + b"odd"
        other.sendall(mqtt.packet(PacketType.PUBLISH, 0b0010, body))
        other.recv(1024)  # what the broker says to it
    client.publish("a", "next", qos=1)
    eventually(lambda: b"next" in received)
    assert client.stats().reconnects == 0
