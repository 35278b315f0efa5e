"""What is asked of a connection, and what it tells."""

from __future__ import annotations

from typing import NamedTuple

import attrs

from tars_mqtt.url import BrokerURL

LAST_PAHO_PACKET_ID = 16_383
"""paho numbers its SUBSCRIBEs from 1 to here, we number PUBLISHes from above: no id is used twice
at a time [MQTT-2.2.1-3]."""

PAHO_PACKETS = frozenset((0x20, 0x90, 0xB0, 0xE0, 0xF0))
"""CONNACK, SUBACK, UNSUBACK, DISCONNECT and AUTH are paho's."""


class Will(NamedTuple):
    """The message that the broker publishes when the connection breaks."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


@attrs.frozen(kw_only=True)
class ConnectRequest:
    """What CONNECT says. Version is 5 or 4, the latter being MQTT 3.1.1."""

    url: BrokerURL
    version: int
    client_id: str
    username: str | None
    password: str | None = attrs.field(repr=False)
    keepalive: int
    session_expiry: int
    receive_maximum: int
    packet_limit: int
    will: Will | None


@attrs.frozen(kw_only=True)
class Connack:
    """The broker's answer to CONNECT. Limits are the standard's defaults where it set none."""

    code: int
    reason: str
    session_present: bool
    receive_maximum: int = 65_535
    maximum_packet_size: int | None = None
    maximum_qos: int = 2
    retain_available: bool = True
    subscription_identifiers: bool = False
    keepalive: int | None = None

    def objection(self, qos: int, retain: bool, packet_bytes: int) -> str | None:
        """Why this broker would end the connection over such a PUBLISH, if it would."""
        if self.maximum_packet_size is not None and packet_bytes > self.maximum_packet_size:
            return f"packet too large: {packet_bytes:,} bytes, the broker takes {self.maximum_packet_size:,}"
        if qos > self.maximum_qos:
            return f"QoS not supported: the broker takes QoS {self.maximum_qos} at most"
        if retain and not self.retain_available:
            return "retain not supported by the broker"
        return None


class Suback(NamedTuple):
    """The answer to one SUBSCRIBE."""

    packet_id: int
    codes: tuple[int, ...]


class Unsuback(NamedTuple):
    """The answer to one UNSUBSCRIBE."""

    packet_id: int


class Disconnect(NamedTuple):
    """The broker ends the connection and says why (MQTT 5)."""

    code: int
    reason: str


class Packets(NamedTuple):
    """A run of message-flow packets, each its first byte and its body."""

    packets: list[tuple[int, bytes]]


Event = Connack | Suback | Unsuback | Disconnect | Packets
