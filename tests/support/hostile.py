"""A broker that sends whatever bytes it likes, and a client that has to bear it on the caller's thread.

For fuzzing: no thread, no network, no time. What the client is fed goes all the way in, through the byte
stream, paho's part, session and ledger, up to where handlers would be called.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING
from unittest.mock import patch

import attrs

from tars_mqtt import DecodeError, MQTTClientConfig
from tars_mqtt._core import connector
from tars_mqtt._core.dispatch import Dispatcher
from tars_mqtt._core.engine import Engine
from tars_mqtt._core.event import Event
from tars_mqtt._core.websocket import Websocket
from tests.support import packet as mqtt
from tests.support.packet import Property

if TYPE_CHECKING:
    from tars_mqtt._core.dispatch import Consumer
    from tars_mqtt._core.lane import Delivery

FILTERS = ("#", "a/+", "$share/group/a/b", "$SYS/#")
_PATIENCE = 20
"""Looks at the connection without reading from it."""

FIRST_PACKET_ID = 16_384
"""Of what the client has under way: a message of QoS 1, and one of QoS 2 behind it."""


@attrs.frozen
class Aftermath:
    """What a client is left with.

    Attributes:
        error: Why the connection ended, as the client says it.
        handled: Messages that came to a handler.
        unread_bytes: What was read of the connection, and still is in memory.
        unsent_bytes: What could not be sent, and still is in memory.
        unacknowledged: Messages that the ledger holds.
    """

    error: str
    handled: int
    unread_bytes: int
    unsent_bytes: int
    unacknowledged: int


class Wire:
    """What the client takes for its socket: gives slice after slice, then the end; takes all, or nothing."""

    def __init__(self, slices: Iterable[bytes], reads: bool = True) -> None:
        self._slices = iter(slices)
        self._reads = reads
        self.left = b""
        self.looks = 0
        # Of a pair that is always readable, so that no selector waits.
        self._real, self._peer = socket.socketpair()
        self._peer.send(b".")

    def recv(self, size: int) -> bytes:
        self.looks += 1
        data = self.left or next(self._slices, b"")
        data, self.left = data[:size], data[size:]
        return data

    def send(self, data: bytes) -> int:
        if not self._reads:
            raise BlockingIOError
        return len(data)

    def fileno(self) -> int:
        return self._real.fileno()

    def close(self) -> None:
        self._real.close()
        self._peer.close()


class Handlers(Dispatcher):
    """Looks at each message as a handler may, and is done with it; or never is."""

    finishes = True

    def submit(self, batches: Mapping[Consumer, list[Delivery]]) -> None:
        for deliveries in batches.values():
            for delivery in deliveries:
                self._handled += 1
                look_at(delivery)
                if self.finishes:
                    delivery.finish()


def look_at(delivery: Delivery) -> None:
    message = delivery.message
    assert 0 <= message.qos <= 2
    assert isinstance(message.properties, Mapping)
    with contextlib.suppress(DecodeError):
        assert isinstance(message.envelope.id, str)


def besiege(
    slices: Iterable[bytes],
    *,
    v5: bool,
    framed: bool = False,
    reads: bool = True,
    finishes: bool = True,
    max_pending: int = 1000,
    max_payload_bytes: int = 1 << 20,
    publishes: bool = True,
) -> Aftermath:
    """Have a client connect, and be sent *slices* in place of what a broker says.

    Args:
        v5: Whether to connect with MQTT 5.
        framed: Whether the client expects the frames of a websocket.
        reads: Whether the broker reads what the client sends.
        finishes: Whether the client's handlers return.
        publishes: Whether the client has published, and waits for acknowledgements.

    Raises:
        Exception: Whatever the network thread was not prepared for: the finding.
    """
    config = MQTTClientConfig(
        "mqtt://localhost",
        "victim",
        protocol="5" if v5 else "3.1.1",
        max_pending=max_pending,
        max_payload_bytes=max_payload_bytes,
        keepalive=65_535,
        connect_timeout=10_000.0,  # how long it takes is the machine's doing
    )
    engine = Engine(config, lambda config, counters, wake, _: Handlers(config, counters, wake))
    assert isinstance(engine.dispatcher, Handlers)
    engine.dispatcher.finishes = finishes
    session = engine._session
    for topic in FILTERS:
        engine.register(topic, 1, None, None, {})
    engine.backlog.open()
    for qos in (1, 2) if publishes else ():
        engine.submit("mine", b"x", qos, False, 0)
    wire = Wire(slices, reads)
    way_in = Websocket(wire) if framed else wire  # type: ignore[arg-type]
    session.transport.start()
    poll = session.transport.poll
    idle = 0

    def poll_at_once(_: float, more: bool, patience: float = 0.0) -> list[Event]:
        """As ever, but without waiting; where nothing is read any more, the client is made to leave."""
        nonlocal idle
        before = wire.looks
        events = poll(0.0, more, patience)
        idle = idle + 1 if wire.looks == before else 0
        if idle > _PATIENCE:
            session.thread.leave_by = time.monotonic()
        return events

    measured: list[tuple[int, int, int]] = []
    lost = session._lost

    def measure(error: Exception | None, held: float) -> None:
        stream = session.transport._stream
        assert stream is not None
        unread = sum(map(len, stream._pieces)) + len(wire.left)
        measured.append((unread, stream.outgoing_bytes, session.inbound.unacknowledged))
        lost(error, held)

    try:
        with (
            patch.object(connector, "dial", lambda *_: way_in),
            patch.object(session, "_lost", measure),
            patch.object(session.transport, "poll", poll_at_once),
        ):
            session._one_connection()
    finally:
        session.transport.close()
        wire.close()
    return Aftermath(session.last_error or "", engine.dispatcher.handled, *(measured or [(0, 0, 0)])[0])


def valid_packets(v5: bool) -> list[bytes]:
    """One of each kind that a broker may send after its CONNACK, and then some."""
    level = 5 if v5 else 4
    properties: dict[int, object] = {
        Property.PAYLOAD_FORMAT_INDICATOR: 1,
        Property.MESSAGE_EXPIRY_INTERVAL: 60,
        Property.CONTENT_TYPE: "text/plain",
        Property.RESPONSE_TOPIC: "answer",
        Property.CORRELATION_DATA: b"\x00\xff",
        Property.USER_PROPERTY: [("a", "b"), ("a", "c")],
        Property.SUBSCRIPTION_IDENTIFIER: [1, 2, 200],
    }
    envelope = b'{"id":"0","type":"t","ts":1.5,"source":"s","data":{"n":[1,null]}}'
    return [
        mqtt.publish("a/b", b"", level=level),
        mqtt.publish("a/b", envelope, level=level, retain=True),
        mqtt.publish("a/\u00e9", envelope, qos=1, packet_id=1, level=level),
        mqtt.publish("a/b", envelope, qos=1, packet_id=1, dup=True, level=level, properties=properties),
        mqtt.publish("a/b", b"x" * 300, qos=2, packet_id=2, level=level),
        mqtt.publish("$SYS/x", b"x", qos=1, packet_id=65_535, level=level),
        mqtt.pubrel(2),
        mqtt.puback(FIRST_PACKET_ID),
        mqtt.pubrec(FIRST_PACKET_ID + 1),
        mqtt.pubcomp(FIRST_PACKET_ID + 1),
        mqtt.puback(1),
        *(mqtt.suback(number + 1, [1], level=level) for number in range(len(FILTERS))),
        mqtt.unsuback(1, [0], level=level),
        mqtt.pingresp(),
        *([mqtt.disconnect(0x8B), mqtt.puback(FIRST_PACKET_ID, 0x97)] if v5 else []),
    ]
