"""The way out without a network: what is written is kept, and acknowledged when the test says so."""

from __future__ import annotations

import math
from typing import Any

import attrs

from tars_mqtt._core import wire
from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.event import Connack
from tars_mqtt._core.outbound import Outbound
from tars_mqtt._core.outgoing import Outgoing
from tars_mqtt._core.property import Properties, encode_properties
from tars_mqtt._core.stats import Counters
from tars_mqtt.message import PublishReceipt
from tests.support import packet as mqtt
from tests.support.clock import FakeClock

GRANTED = Connack(code=0, reason="", session_present=False)


class Harness:
    """An `Outbound` with a network that keeps what is written to it."""

    def __init__(
        self, max_inflight: int = 64, max_queued: int = 100, max_queued_bytes: int = 1 << 20
    ) -> None:
        self.counters = Counters()
        self.wakes = 0
        self.clock = FakeClock()
        self.idle_stream: Any = None
        """What a publisher may send on at once."""
        self.backlog = Backlog(max_queued, max_queued_bytes, self.wake, lambda: self.idle_stream)
        self.outbound = Outbound(self.backlog, max_inflight, self.counters, clock=self.clock)
        self.v5 = True
        self.more = False

    def wake(self) -> None:
        self.wakes += 1

    def connect(self, v5: bool = True, resumed: bool = False, **limits: Any) -> None:
        self.v5 = v5
        self.outbound.connected(attrs.evolve(GRANTED, **limits), v5, resumed)

    def disconnect(self, by_broker: bool = True) -> None:
        self.outbound.disconnected(by_broker)

    def reconnect(self, resumed: bool, by_broker: bool = False, **limits: Any) -> None:
        self.disconnect(by_broker)
        self.connect(self.v5, resumed, **limits)

    def submit(
        self, payload: bytes = b"x", qos: int = 1, timeout: float | None = 0, **options: Any
    ) -> Outgoing:
        properties = options.pop("properties", None)
        message = outgoing(payload, qos, **options)
        if properties:
            message.properties = Properties.since(encode_properties(properties), self.clock())
        if qos:
            self.backlog.admit(message, timeout)
        else:
            raw = b"" if message.properties is None else message.properties.raw
            self.backlog.admit_lossy(message.topic, payload, message.retain, timeout, raw)
        return message

    def pump(self, unsent_bytes: int = 0) -> list[mqtt.Packet]:
        written: list[bytes] = []
        self.more = self.outbound.pump(written.extend, unsent_bytes)
        suspicion = self.outbound.suspicion
        while suspicion.wants_answer or suspicion.look_again_at < math.inf:
            assert written == []
            if suspicion.wants_answer:
                suspicion.answered()
            else:
                self.clock.advance(1.0)
            self.more = self.outbound.pump(written.extend, unsent_bytes)
        return [mqtt.read_packet(Reader(packet)) for packet in written]

    def publishes(self, unsent_bytes: int = 0) -> list[mqtt.Publish]:
        return [mqtt.read_publish(packet, 5 if self.v5 else 4) for packet in self.pump(unsent_bytes)]

    def payloads(self) -> list[bytes]:
        return [publish.payload for publish in self.publishes()]

    def acknowledge(self, message: Outgoing, reason: int = 0, kind: int = wire.PUBACK) -> bytes | None:
        return self.outbound.acknowledged(kind, message.packet_id, reason)

    def held(self) -> tuple[int, int]:
        return self.backlog.held, self.backlog.held_bytes


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def __call__(self, count: int) -> bytes:
        taken, self.data = self.data[:count], self.data[count:]
        return taken


def outgoing(payload: bytes = b"x", qos: int = 1, retain: bool = False, topic: bytes = b"t") -> Outgoing:
    return Outgoing(topic, payload, qos, retain, PublishReceipt("id", topic.decode(), qos))
