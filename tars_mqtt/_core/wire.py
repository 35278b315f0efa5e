"""MQTT 3.1.1 and 5 on the wire: the packets that carry messages, to bytes and back.

Pure functions. Everything decoded comes from a peer that is not trusted: any bytes give a result or a
`MalformedPacketError`. These functions run once or more per message, hence the arithmetic in place of calls.
"""

from __future__ import annotations

import struct
from typing import Final, TypeAlias

# First bytes. Only the flags of PUBLISH vary; those the others reserve are in the value [MQTT-2.1.3-1].
CONNACK: Final = 0x20
PUBLISH: Final = 0x30
PUBACK: Final = 0x40
PUBREC: Final = 0x50
PUBREL: Final = 0x62
PUBCOMP: Final = 0x70
SUBACK: Final = 0x90
UNSUBACK: Final = 0xB0
PINGRESP: Final = 0xD0
DISCONNECT: Final = 0xE0
AUTH: Final = 0xF0

PASSED_OVER: Final = 0x00
"""Nothing on the wire begins with it: what is left of a PUBLISH that was too large to be held, with its
flags; topic and packet id."""

PINGREQ_PACKET: Final = b"\xc0\x00"
MAX_VARINT: Final = 268_435_455
MAX_REMAINING_LENGTH: Final = MAX_VARINT
MAX_PACKET_BYTES: Final = 5 + MAX_REMAINING_LENGTH
MAX_PROPERTIES_BYTES: Final = 65_535
"""Of a PUBLISH that we take; the standard has no limit, and they are read on the network thread."""

_BESIDE_PAYLOAD: Final = 5 + 2 + 65_535 + 2 + 3 + MAX_PROPERTIES_BYTES

PACKET_IDENTIFIER_IN_USE: Final = 0x91
PACKET_IDENTIFIER_NOT_FOUND: Final = 0x92

Publish: TypeAlias = tuple[str, bytes, int, bool, bool, int, bytes]
"""Topic, payload, QoS, retain, dup, packet id (0 with QoS 0), packed properties without their length."""

_PUBLISH_FLAGS: Final = {
    PUBLISH | dup << 3 | qos << 1 | retain: (qos, bool(retain), bool(dup))
    for qos in (0, 1, 2)
    for retain in (0, 1)
    for dup in ((0, 1) if qos else (0,))
}
# fmt: off
_FIRST_BYTES_3: Final = frozenset(_PUBLISH_FLAGS) | {  # of what a server may send
    CONNACK, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBACK, UNSUBACK, PINGRESP, DISCONNECT,
}
# fmt: on
_FIRST_BYTES_5: Final = _FIRST_BYTES_3 | {AUTH}

_UNENDING: Final = 1 << 62  # the length of a packet whose length field does not end: above every limit
_CACHED_TOPICS: Final = 4096
_CACHED_TOPIC_BYTES: Final = 256

# Shared by all clients of the process. Each step on it is atomic, and a lost entry costs one decoding.
_topics: dict[bytes, str] = {}

_pack_short_head = struct.Struct("!BBH").pack
_pack_long_head = struct.Struct("!BBBH").pack
_pack_ack_reason = struct.Struct("!BBHB").pack
_pack_uint16 = struct.Struct("!H").pack


class MalformedPacketError(Exception):
    """The peer sent what the standard forbids; the connection cannot go on."""


class PacketTooLargeError(MalformedPacketError):
    """A packet is larger than we told the peer that we take."""


def packet_limit(max_payload_bytes: int) -> int:
    """How large a PUBLISH with that much payload can be, topic and properties included."""
    return min(max_payload_bytes + _BESIDE_PAYLOAD, MAX_PACKET_BYTES)


# -- the byte stream --------------------------------------------------------------------------


def split_packets(
    buffer: bytes | bytearray, limit: int, v5: bool = True
) -> tuple[list[tuple[int, int, int]], int, int]:
    """Find the whole packets at the front of *buffer*.

    Args:
        buffer: What was received and is not consumed yet.
        limit: The longest packet allowed, its header included.
        v5: Whether the connection speaks MQTT 5.

    Returns:
        First byte, start and end of the body of each packet; the bytes they take together; and how many
        bytes must stand after those before another call finds anything. The last is 0 where an error waits
        behind good packets, which are not lost to it: the next call raises it.

    Raises:
        MalformedPacketError: *buffer* begins with what is not a packet, or is one that may not be.
    """
    legal = _FIRST_BYTES_5 if v5 else _FIRST_BYTES_3
    packets: list[tuple[int, int, int]] = []
    size = len(buffer)
    start = 0
    while start + 1 < size:
        first = buffer[start]
        length = buffer[start + 1]
        body = start + 2
        if length > 127:
            if body == size:
                break
            high = buffer[body]
            body += 1
            if high < 128:
                length += (high - 1) << 7
            else:
                length, body = _long_length(buffer, start + 1)
                if length < 0:
                    break
        end = body + length
        if first not in legal or end - start > limit:
            if packets:
                return packets, start, 0
            raise _header_error(first, first in legal, length, limit)
        if end > size:
            return packets, start, end - start
        packets.append((first, body, end))
        start = end
    return packets, start, size - start + 1


def _long_length(buffer: bytes | bytearray, position: int) -> tuple[int, int]:
    """A remaining length and where it ends; -1 where the buffer ends first.

    A length written with more bytes than it needs passes: 3.1.1 does not forbid it, and it is not ambiguous.
    """
    length = 0
    for shift in (0, 7, 14, 21):
        if position == len(buffer):
            return -1, position
        byte = buffer[position]
        position += 1
        length |= (byte & 127) << shift
        if byte < 128:
            return length, position
    return _UNENDING, position


def _header_error(first: int, legal: bool, length: int, limit: int) -> MalformedPacketError:
    if not legal:
        if first & 0xF0 == PUBLISH:
            return _publish_flags_error(first)
        return MalformedPacketError(
            f"no packet of a server begins with 0x{first:02x} (section 2.1.2) [MQTT-2.1.3-1]"
        )
    if length == _UNENDING:
        return MalformedPacketError("remaining length of more than four bytes (section 2.1.4)")
    return PacketTooLargeError(
        f"packet with a body of {length:,} bytes, above the limit of {limit:,} [MQTT-3.1.2-24]"
    )


def _publish_flags_error(first: int) -> MalformedPacketError:
    if first & 0x06 == 0x06:
        return MalformedPacketError("PUBLISH with both bits of its QoS set [MQTT-3.3.1-4]")
    return MalformedPacketError("PUBLISH with DUP set and QoS 0 [MQTT-3.3.1-2]")


def decode_varint(buffer: bytes | bytearray | memoryview, position: int = 0) -> tuple[int, int]:
    """The Variable Byte Integer at *position*, and the position after it."""
    value = 0
    for shift in (0, 7, 14, 21):
        if position >= len(buffer):
            raise MalformedPacketError("packet ends inside a Variable Byte Integer (section 1.5.5)")
        byte = buffer[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if shift and not byte:
                raise MalformedPacketError("Variable Byte Integer longer than it needs [MQTT-1.5.5-1]")
            return value, position
    raise MalformedPacketError("Variable Byte Integer of more than four bytes (section 1.5.5)")


def encode_varint(value: int) -> bytes:
    if not 0 <= value <= MAX_REMAINING_LENGTH:
        raise ValueError(f"{value:,} does not fit the protocol's largest length, {MAX_REMAINING_LENGTH:,}")
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


# -- PUBLISH ----------------------------------------------------------------------------------


def encode_publish(
    topic: bytes,
    payload: bytes,
    qos: int,
    retain: bool,
    dup: bool,
    packet_id: int,
    v5: bool,
    properties: bytes = b"",
) -> bytes:
    """One whole PUBLISH packet; *properties* are packed, without their length.

    Raises:
        ValueError: The packet is larger than the protocol can say.
    """
    tail = _pack_uint16(packet_id) if qos else b""
    if v5:
        tail += encode_varint(len(properties)) + properties if properties else b"\x00"
    first = PUBLISH | dup << 3 | qos << 1 | retain
    topic_length = len(topic)
    length = 2 + topic_length + len(tail) + len(payload)
    if length < 0x80:
        head = _pack_short_head(first, length, topic_length)
    elif length < 0x4000:
        head = _pack_long_head(first, length & 127 | 128, length >> 7, topic_length)
    else:
        head = bytes((first,)) + encode_varint(length) + _pack_uint16(topic_length)
    return b"".join((head, topic, tail, payload))


def decode_publish(  # noqa: C901 - in one piece, because calls are what costs
    first: int, body: bytes | bytearray | memoryview, v5: bool
) -> Publish:
    """What a PUBLISH says; its properties stay packed."""
    if type(body) is not bytes:
        body = bytes(body)
    try:
        qos, retain, dup = _PUBLISH_FLAGS[first]
        position = 2 + (body[0] << 8 | body[1])
        raw = body[2:position]
        topic = _topics.get(raw)
        if topic is None:
            topic = _decode_topic(raw, position - 2)
        packet_id = 0
        if qos:
            packet_id = body[position] << 8 | body[position + 1]
            position += 2
        properties = b""
        if v5:
            length = body[position]
            position += 1
            if length:
                if length > 127:
                    length, position = decode_varint(body, position - 1)
                end = position + length
                properties = body[position:end]
                position = end
    except KeyError:
        raise _publish_flags_error(first) from None
    except IndexError:
        raise MalformedPacketError("PUBLISH ends inside its variable header (section 3.3.2)") from None
    if position > len(body):
        raise MalformedPacketError("PUBLISH ends inside its variable header (section 3.3.2)")
    if qos and not packet_id:
        raise MalformedPacketError("PUBLISH with packet identifier 0 [MQTT-2.2.1-4]")
    return topic, body[position:], qos, retain, dup, packet_id, properties


def _decode_topic(raw: bytes, length: int) -> str:
    if len(raw) < length:
        raise MalformedPacketError("PUBLISH ends inside its topic (section 3.3.2.1)")
    if not raw:
        # Topic aliases do not come into it: a client that announces none is sent none [MQTT-3.1.2-27].
        raise MalformedPacketError("PUBLISH with an empty topic [MQTT-4.7.3-1]")
    if b"+" in raw or b"#" in raw:
        raise MalformedPacketError("PUBLISH with a wildcard in its topic [MQTT-3.3.2-2]")
    topic = decode_text(raw)
    if len(raw) <= _CACHED_TOPIC_BYTES:
        if len(_topics) >= _CACHED_TOPICS:
            _topics.clear()
        _topics[raw] = topic
    return topic


def decode_text(raw: bytes) -> str:
    """A UTF-8 string of the standard [MQTT-1.5.4]."""
    if b"\x00" in raw:
        raise MalformedPacketError("U+0000 in a UTF-8 string [MQTT-1.5.4-2]")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise MalformedPacketError("ill-formed UTF-8 [MQTT-1.5.4-1]") from None


# -- PUBACK, PUBREC, PUBREL, PUBCOMP ----------------------------------------------------------


def encode_ack(kind: int, packet_id: int) -> bytes:
    """An acknowledgement that says success, the same bytes in both versions."""
    return _pack_short_head(kind, 2, packet_id)


def encode_ack_reason(kind: int, packet_id: int, reason: int) -> bytes:
    """An acknowledgement with a reason code, which only MQTT 5 has."""
    return _pack_ack_reason(kind, 3, packet_id, reason)


def decode_ack(body: bytes | bytearray | memoryview, v5: bool) -> tuple[int, int]:
    """Packet id and reason code, 0 where there is none."""
    size = len(body)
    if size < 2 or (size > 2 and not v5):
        raise MalformedPacketError(f"acknowledgement with a body of {size} bytes (section 3.4)")
    packet_id = body[0] << 8 | body[1]
    if not packet_id:
        raise MalformedPacketError("acknowledgement of packet identifier 0 [MQTT-2.2.1-5]")
    if size == 2:
        return packet_id, 0
    if size > 3:
        length, start = decode_varint(body, 3)
        if start + length != size:
            raise MalformedPacketError("acknowledgement whose properties do not fill it (section 3.4.2.2)")
    return packet_id, body[2]


# -- reasons ----------------------------------------------------------------------------------


def reason_name(code: int) -> str:
    """A reason code of a failure in the words of the standard, the same in every packet [section 2.4]."""
    if 0 <= code - 0x80 < len(_FAILURES):
        return _FAILURES[code - 0x80]
    return f"unknown reason 0x{code:02x}"


# fmt: off
_FAILURES: Final = (  # 0x80 to 0xA2 without a gap
    "Unspecified error", "Malformed Packet", "Protocol Error", "Implementation specific error",
    "Unsupported Protocol Version", "Client Identifier not valid", "Bad User Name or Password",
    "Not authorized",
    "Server unavailable", "Server busy", "Banned", "Server shutting down",
    "Bad authentication method", "Keep Alive timeout", "Session taken over", "Topic Filter invalid",
    "Topic Name invalid", "Packet Identifier in use", "Packet Identifier not found",
    "Receive Maximum exceeded",
    "Topic Alias invalid", "Packet too large", "Message rate too high", "Quota exceeded",
    "Administrative action", "Payload format invalid", "Retain not supported", "QoS not supported",
    "Use another server", "Server moved", "Shared Subscriptions not supported", "Connection rate exceeded",
    "Maximum connect time", "Subscription Identifiers not supported",
    "Wildcard Subscriptions not supported",
)
# fmt: on
