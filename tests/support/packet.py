"""MQTT packets as bytes, 3.1.1 and 5: what a scripted broker says and hears.

Written from the standard and apart from the package's own code, so that each can be wrong without the other.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

V311 = 4
V5 = 5


class PacketType(enum.IntEnum):
    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15


class Property(enum.IntEnum):
    """Identifiers of the MQTT 5 properties [MQTT5-2.2.2.2]."""

    PAYLOAD_FORMAT_INDICATOR = 0x01
    MESSAGE_EXPIRY_INTERVAL = 0x02
    CONTENT_TYPE = 0x03
    RESPONSE_TOPIC = 0x08
    CORRELATION_DATA = 0x09
    SUBSCRIPTION_IDENTIFIER = 0x0B
    SESSION_EXPIRY_INTERVAL = 0x11
    ASSIGNED_CLIENT_IDENTIFIER = 0x12
    SERVER_KEEP_ALIVE = 0x13
    AUTHENTICATION_METHOD = 0x15
    AUTHENTICATION_DATA = 0x16
    REQUEST_PROBLEM_INFORMATION = 0x17
    WILL_DELAY_INTERVAL = 0x18
    REQUEST_RESPONSE_INFORMATION = 0x19
    RESPONSE_INFORMATION = 0x1A
    SERVER_REFERENCE = 0x1C
    REASON_STRING = 0x1F
    RECEIVE_MAXIMUM = 0x21
    TOPIC_ALIAS_MAXIMUM = 0x22
    TOPIC_ALIAS = 0x23
    MAXIMUM_QOS = 0x24
    RETAIN_AVAILABLE = 0x25
    USER_PROPERTY = 0x26
    MAXIMUM_PACKET_SIZE = 0x27
    WILDCARD_SUBSCRIPTION_AVAILABLE = 0x28
    SUBSCRIPTION_IDENTIFIER_AVAILABLE = 0x29
    SHARED_SUBSCRIPTION_AVAILABLE = 0x2A


_BYTE = {0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A}
_TWO_BYTES = {0x13, 0x21, 0x22, 0x23}
_FOUR_BYTES = {0x02, 0x11, 0x18, 0x27}
_VARIABLE = {0x0B}
_BINARY = {0x09, 0x16}
_PAIR = {0x26}

PropertyValue = int | str | bytes | tuple[str, str]
Properties = dict[Property, list[PropertyValue]]
"""Each property with its values, in order: some may come several times."""


class Packet(NamedTuple):
    """One packet as it came."""

    type: PacketType
    flags: int
    body: bytes

    @property
    def packet_id(self) -> int:
        """Of an acknowledgement, SUBSCRIBE or UNSUBSCRIBE. A PUBLISH is read with ``read_publish``."""
        return int.from_bytes(self.body[:2])

    def __repr__(self) -> str:
        return f"<{self.type.name} flags={self.flags:#x} body={self.body[:40]!r} ({len(self.body)} bytes)>"


class Connect(NamedTuple):
    level: int
    client_id: str
    clean: bool
    keepalive: int
    properties: Properties
    will: Will | None
    username: str | None
    password: bytes | None


class Will(NamedTuple):
    topic: str
    payload: bytes
    qos: int
    retain: bool
    properties: Properties


class Publish(NamedTuple):
    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    packet_id: int
    properties: Properties


class Subscribe(NamedTuple):
    packet_id: int
    filters: list[tuple[str, int]]
    """Each filter with its options; in 3.1.1 these are the QoS alone."""
    properties: Properties


# -- writing ------------------------------------------------------------------------------


def packet(kind: PacketType, flags: int, body: bytes) -> bytes:
    return bytes([kind << 4 | flags]) + _variable(len(body)) + body


def connect(client_id: str, *, level: int = V311, keepalive: int = 60, clean: bool = True) -> bytes:
    body = _text("MQTT") + bytes([level, 2 if clean else 0]) + struct.pack("!H", keepalive)
    return packet(PacketType.CONNECT, 0, body + _properties(level, None) + _text(client_id))


def connack(
    code: int = 0,
    *,
    level: int = V311,
    session_present: bool = False,
    properties: Mapping[int, object] | None = None,
) -> bytes:
    body = bytes([session_present, code]) + _properties(level, properties)
    return packet(PacketType.CONNACK, 0, body)


def publish(
    topic: str,
    payload: bytes,
    *,
    qos: int = 0,
    packet_id: int = 0,
    retain: bool = False,
    dup: bool = False,
    level: int = V311,
    properties: Mapping[int, object] | None = None,
) -> bytes:
    identifier = struct.pack("!H", packet_id) if qos else b""
    body = _text(topic) + identifier + _properties(level, properties) + payload
    return packet(PacketType.PUBLISH, dup << 3 | qos << 1 | retain, body)


def puback(packet_id: int, code: int | None = None) -> bytes:
    """*code* is MQTT 5's reason; left out it means success, in both versions."""
    return _acknowledgement(PacketType.PUBACK, 0, packet_id, code)


def pubrec(packet_id: int, code: int | None = None) -> bytes:
    return _acknowledgement(PacketType.PUBREC, 0, packet_id, code)


def pubrel(packet_id: int, code: int | None = None) -> bytes:
    return _acknowledgement(PacketType.PUBREL, 2, packet_id, code)


def pubcomp(packet_id: int, code: int | None = None) -> bytes:
    return _acknowledgement(PacketType.PUBCOMP, 0, packet_id, code)


def subscribe(packet_id: int, *filters: tuple[str, int], level: int = V311) -> bytes:
    body = struct.pack("!H", packet_id) + _properties(level, None)
    body += b"".join(_text(name) + bytes([options]) for name, options in filters)
    return packet(PacketType.SUBSCRIBE, 2, body)


def suback(packet_id: int, codes: Iterable[int], *, level: int = V311) -> bytes:
    """A granted QoS, or a reason from 0x80 upwards, for each filter."""
    body = struct.pack("!H", packet_id) + _properties(level, None) + bytes(codes)
    return packet(PacketType.SUBACK, 0, body)


def unsuback(packet_id: int, codes: Iterable[int] = (), *, level: int = V311) -> bytes:
    """3.1.1 knows no codes here."""
    body = struct.pack("!H", packet_id) + _properties(level, None)
    return packet(PacketType.UNSUBACK, 0, body + (bytes(codes) if level >= V5 else b""))


def pingreq() -> bytes:
    return packet(PacketType.PINGREQ, 0, b"")


def pingresp() -> bytes:
    return packet(PacketType.PINGRESP, 0, b"")


def disconnect(code: int | None = None, *, properties: Mapping[int, object] | None = None) -> bytes:
    """With a code it is MQTT 5's, which a broker may send too."""
    body = b"" if code is None else bytes([code]) + _properties(V5, properties)
    return packet(PacketType.DISCONNECT, 0, body)


def _acknowledgement(kind: PacketType, flags: int, packet_id: int, code: int | None) -> bytes:
    reason = b"" if code is None else bytes([code])
    return packet(kind, flags, struct.pack("!H", packet_id) + reason)


def _variable(value: int) -> bytes:
    encoded = bytearray()
    while True:
        value, digit = divmod(value, 128)
        encoded.append(digit | (0x80 if value else 0))
        if not value:
            return bytes(encoded)


def _text(value: str) -> bytes:
    return _binary(value.encode())


def _binary(value: bytes) -> bytes:
    return struct.pack("!H", len(value)) + value


def _properties(level: int, properties: Mapping[int, object] | None) -> bytes:
    """A value that is a list is written once for each of its items."""
    if level < V5:
        return b""
    body = b""
    for identifier, values in (properties or {}).items():
        for value in values if isinstance(values, list) else [values]:
            body += bytes([identifier]) + _property(identifier, value)
    return _variable(len(body)) + body


def _property(identifier: int, value: object) -> bytes:
    if isinstance(value, int):
        if identifier in _VARIABLE:
            return _variable(value)
        size = 1 if identifier in _BYTE else 2 if identifier in _TWO_BYTES else 4
        return value.to_bytes(size)
    if isinstance(value, bytes):
        return _binary(value)
    if isinstance(value, str):
        return _text(value)
    assert isinstance(value, tuple)
    name, text = value
    return _text(name) + _text(text)


# -- reading ------------------------------------------------------------------------------


def read_packet(receive: Callable[[int], bytes]) -> Packet:
    """The next packet; *receive* gives exactly as many bytes as it is asked for."""
    first = receive(1)[0]
    length = shift = 0
    while True:
        digit = receive(1)[0]
        length |= (digit & 0x7F) << shift
        shift += 7
        if digit < 0x80:
            return Packet(PacketType(first >> 4), first & 0x0F, receive(length))


def read_connect(packet: Packet) -> Connect:
    reader = _Reader(packet.body)
    assert reader.text() == "MQTT"
    level, flags, keepalive = reader.byte(), reader.byte(), reader.number(2)
    properties = reader.properties(level)
    client_id = reader.text()
    will = None
    if flags & 0x04:
        will_properties = reader.properties(level)
        will = Will(reader.text(), reader.binary(), flags >> 3 & 3, bool(flags & 0x20), will_properties)
    username = reader.text() if flags & 0x80 else None
    password = reader.binary() if flags & 0x40 else None
    reader.expect_end()
    return Connect(level, client_id, bool(flags & 0x02), keepalive, properties, will, username, password)


def read_publish(packet: Packet, level: int = V311) -> Publish:
    reader = _Reader(packet.body)
    qos = packet.flags >> 1 & 3
    topic = reader.text()
    packet_id = reader.number(2) if qos else 0
    properties = reader.properties(level)
    retain, dup = bool(packet.flags & 1), bool(packet.flags & 8)
    return Publish(topic, reader.rest(), qos, retain, dup, packet_id, properties)


def read_subscribe(packet: Packet, level: int = V311) -> Subscribe:
    reader = _Reader(packet.body)
    packet_id, properties = reader.number(2), reader.properties(level)
    filters = []
    while reader.left:
        filters.append((reader.text(), reader.byte()))
    return Subscribe(packet_id, filters, properties)


def read_unsubscribe(packet: Packet, level: int = V311) -> list[str]:
    reader = _Reader(packet.body)
    reader.number(2)
    reader.properties(level)
    filters = []
    while reader.left:
        filters.append(reader.text())
    return filters


class _Reader:
    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._body) - self._at

    def take(self, count: int) -> bytes:
        assert count <= self.left, f"the packet ends {count - self.left} bytes too early"
        self._at += count
        return self._body[self._at - count : self._at]

    def rest(self) -> bytes:
        return self.take(self.left)

    def expect_end(self) -> None:
        assert not self.left, f"{self.left} bytes too many"

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def binary(self) -> bytes:
        return self.take(self.number(2))

    def text(self) -> str:
        return self.binary().decode()

    def variable(self) -> int:
        value = shift = 0
        while True:
            digit = self.byte()
            value |= (digit & 0x7F) << shift
            shift += 7
            if digit < 0x80:
                return value

    def properties(self, level: int) -> Properties:
        found: Properties = {}
        if level >= V5:
            length = self.variable()
            behind = self.left - length
            while self.left > behind:
                identifier = Property(self.byte())
                found.setdefault(identifier, []).append(self._property(identifier))
        return found

    def _property(self, identifier: int) -> PropertyValue:
        if identifier in _VARIABLE:
            return self.variable()
        for numbers, size in ((_BYTE, 1), (_TWO_BYTES, 2), (_FOUR_BYTES, 4)):
            if identifier in numbers:
                return self.number(size)
        if identifier in _BINARY:
            return self.binary()
        if identifier in _PAIR:
            return self.text(), self.text()
        return self.text()
