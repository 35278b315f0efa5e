"""The properties of a PUBLISH in MQTT 5, to bytes and back, by the names of the standard in snake_case.

Pure functions. What is decoded comes from a peer that is not trusted: any bytes give a result or a
`MalformedPacketError`. What is encoded comes from our user, who is told what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from tars_mqtt._core.wire import (
    MAX_PROPERTIES_BYTES,
    MalformedPacketError,
    decode_text,
    decode_varint,
)
from tars_mqtt.errors import EncodeError, TopicError
from tars_mqtt.topics import MAX_STRING_BYTES, topic_bytes

_PAYLOAD_FORMAT: Final = 0x01
_MESSAGE_EXPIRY: Final = 0x02
_CONTENT_TYPE: Final = 0x03
_RESPONSE_TOPIC: Final = 0x08
_CORRELATION_DATA: Final = 0x09
_SUBSCRIPTION_IDENTIFIER: Final = 0x0B
_TOPIC_ALIAS: Final = 0x23
_USER_PROPERTY: Final = 0x26

_CACHED_IDENTIFIERS: Final = 4096
_CACHED_PROPERTIES_BYTES: Final = 64

# Shared by all clients of the process. Each step on it is atomic, and a lost entry costs one decoding.
_identifiers: dict[bytes, tuple[int, ...]] = {}


# -- out --------------------------------------------------------------------------------------


@attrs.frozen
class Properties:
    """What goes out with one message."""

    raw: bytes
    """Packed, without their length. The expiry interval, where there is one, comes first."""
    expires: float | None
    """On the monotonic clock: when the message is not worth sending any more."""

    @classmethod
    def since(cls, raw: bytes, moment: float) -> Properties:
        """Those of a message that has waited since that *moment* on the monotonic clock."""
        interval = int.from_bytes(raw[1:5]) if raw[0] == _MESSAGE_EXPIRY else 0
        return cls(raw, moment + interval if interval else None)

    def expired(self, now: float) -> bool:
        """Whether the message has waited for too long."""
        return self.expires is not None and now >= self.expires

    def at(self, now: float) -> bytes:
        """As they are to be sent now: the time that the message waited is taken off its expiry interval."""
        if self.expires is None:
            return self.raw
        left = max(1, math.ceil(self.expires - now))
        return self.raw[:1] + left.to_bytes(4) + self.raw[5:]


def encode_properties(properties: Mapping[str, object]) -> bytes:
    """Check and pack what goes out with a message, the expiry interval first.

    Those of a message that came in are welcome, too: its subscription identifiers and its topic alias belong to the
    connection that brought it, and are left out.

    Raises:
        EncodeError: There is no such property, or this cannot be its value; the path says which.
        TypeError: It is no mapping.
    """
    if not isinstance(properties, Mapping):
        raise TypeError(f"properties must be a mapping of names to values, not {type(properties).__name__}")
    unknown = properties.keys() - _WRITE.keys() - {"user_properties"} - _BROUGHT
    if unknown:
        known = ", ".join((*_WRITE, "user_properties"))
        raise EncodeError(
            f"there is no property {min(unknown, key=str)!r} of a message: choose from {known}", "properties"
        )
    pieces = [
        bytes((identifier,)) + write(properties[name], f"properties.{name}")
        for name, (identifier, write) in _WRITE.items()
        if name in properties
    ]
    pieces += _write_user_properties(properties.get("user_properties", ()), "properties.user_properties")
    raw = b"".join(pieces)
    if len(raw) > MAX_PROPERTIES_BYTES:
        raise EncodeError(
            f"the properties take {len(raw):,} bytes: {MAX_PROPERTIES_BYTES:,} are allowed", "properties"
        )
    return raw


def _write_expiry(value: object, path: str) -> bytes:
    return _whole(value, 0xFFFF_FFFF, path).to_bytes(4)


def _write_payload_format(value: object, path: str) -> bytes:
    return _whole(value, 1, path).to_bytes(1)


def _whole(value: object, most: int, path: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 1.0 from somebody's YAML
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
        return value
    raise EncodeError(f"{path} must be a whole number from 0 to {most:,}", path)


def _write_text(value: object, path: str) -> bytes:
    if not isinstance(value, str):
        raise EncodeError(f"{path} must be a str, not {type(value).__name__}", path)
    if "\0" in value:
        raise EncodeError(f"{path} contains the character U+0000: remove it", path)
    try:
        return _sized(value.encode(), path)
    except UnicodeEncodeError:
        raise EncodeError(f"{path} holds half of a surrogate pair, which UTF-8 cannot carry", path) from None


def _write_response_topic(value: object, path: str) -> bytes:
    try:
        return _sized(topic_bytes(value), path)
    except TopicError as error:
        raise EncodeError(f"{path}: {error}", path) from None


def _write_binary(value: object, path: str) -> bytes:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise EncodeError(f"{path} must be bytes, not {type(value).__name__}", path)
    return _sized(bytes(value), path)


def _write_user_properties(value: object, path: str) -> list[bytes]:
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        texts = [(key, text) for key, text in pairs]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise EncodeError(f"{path} must be a mapping, or pairs, of str to str", path) from None
    head = bytes((_USER_PROPERTY,))
    return [head + _write_text(key, path) + _write_text(text, path) for key, text in texts]


def _sized(raw: bytes, path: str) -> bytes:
    if len(raw) > MAX_STRING_BYTES:
        raise EncodeError(f"{path} takes {len(raw):,} bytes: {MAX_STRING_BYTES:,} are allowed", path)
    return len(raw).to_bytes(2) + raw


_WRITE: Final[dict[str, tuple[int, Callable[[object, str], bytes]]]] = {
    "message_expiry_interval": (_MESSAGE_EXPIRY, _write_expiry),
    "payload_format_indicator": (_PAYLOAD_FORMAT, _write_payload_format),
    "content_type": (_CONTENT_TYPE, _write_text),
    "response_topic": (_RESPONSE_TOPIC, _write_response_topic),
    "correlation_data": (_CORRELATION_DATA, _write_binary),
}
_BROUGHT: Final = frozenset(("subscription_identifiers", "topic_alias"))


# -- in ---------------------------------------------------------------------------------------


def subscription_identifiers(properties: bytes) -> tuple[int, ...]:
    """The subscriptions that a broker says a message is for, none in a message sent without."""
    identifiers = _identifiers.get(properties)
    if identifiers is None:
        found = decode_properties(properties).get("subscription_identifiers", ())
        assert isinstance(found, tuple)
        identifiers = found
        if len(properties) <= _CACHED_PROPERTIES_BYTES:
            if len(_identifiers) >= _CACHED_IDENTIFIERS:
                _identifiers.clear()
            _identifiers[properties] = identifiers
    return identifiers


def decode_properties(raw: bytes) -> dict[str, object]:
    """The properties of a PUBLISH under their names in the standard, in lower case with underscores.

    ``user_properties`` is a list of pairs, ``subscription_identifiers`` a tuple, ``correlation_data`` bytes.
    """
    found: dict[str, object] = {}
    user_properties: list[tuple[str, str]] = []
    identifiers: list[int] = []
    position = 0
    while position < len(raw):
        identifier = raw[position]
        position += 1
        if identifier == _USER_PROPERTY:
            key, position = _read_text(raw, position)
            value, position = _read_text(raw, position)
            user_properties.append((key, value))
        elif identifier == _SUBSCRIPTION_IDENTIFIER:
            number, position = _read_identifier(raw, position)
            identifiers.append(number)
        else:
            known = _READ.get(identifier)
            if known is None:
                raise MalformedPacketError(f"PUBLISH with the property 0x{identifier:02x} (section 2.2.2.2)")
            name, read = known
            if name in found:
                raise MalformedPacketError(f"{name} more than once (section 3.3.2.3)")
            found[name], position = read(raw, position)
    for name, allows in _ALLOWED.items():
        if name in found and not allows(found[name]):
            del found[name]
    if user_properties:
        found["user_properties"] = user_properties
    if identifiers:
        found["subscription_identifiers"] = tuple(identifiers)
    return found


def _read_uint(raw: bytes, position: int, size: int) -> tuple[int, int]:
    end = position + size
    if end > len(raw):
        raise MalformedPacketError("properties end inside a value (section 2.2.2.2)")
    return int.from_bytes(raw[position:end], "big"), end


def _read_binary(raw: bytes, position: int) -> tuple[bytes, int]:
    length, start = _read_uint(raw, position, 2)
    end = start + length
    if end > len(raw):
        raise MalformedPacketError("properties end inside a value (section 2.2.2.2)")
    return raw[start:end], end


def _read_text(raw: bytes, position: int) -> tuple[str, int]:
    value, end = _read_binary(raw, position)
    return decode_text(value), end


def _read_byte(raw: bytes, position: int) -> tuple[int, int]:
    return _read_uint(raw, position, 1)


def _read_expiry(raw: bytes, position: int) -> tuple[int, int]:
    return _read_uint(raw, position, 4)


def _read_topic_alias(raw: bytes, position: int) -> tuple[int, int]:
    value, end = _read_uint(raw, position, 2)
    if not value:
        raise MalformedPacketError("topic alias 0 [MQTT-3.3.2-8]")
    return value, end


def _read_identifier(raw: bytes, position: int) -> tuple[int, int]:
    value, end = decode_varint(raw, position)
    if not value:
        raise MalformedPacketError("subscription identifier 0 (section 3.3.2.3.8)")
    return value, end


_READ: Final[dict[int, tuple[str, Callable[[bytes, int], tuple[object, int]]]]] = {
    _PAYLOAD_FORMAT: ("payload_format_indicator", _read_byte),
    _MESSAGE_EXPIRY: ("message_expiry_interval", _read_expiry),
    _CONTENT_TYPE: ("content_type", _read_text),
    _RESPONSE_TOPIC: ("response_topic", _read_text),
    _CORRELATION_DATA: ("correlation_data", _read_binary),
    _TOPIC_ALIAS: ("topic_alias", _read_topic_alias),
}

# mosquitto passes on what the standard does not allow here. What anybody may publish must not cost its readers the
# connection: they do without it.
_ALLOWED: Final[dict[str, Callable[[Any], bool]]] = {
    "payload_format_indicator": lambda value: value <= 1,
    "response_topic": lambda value: value != "" and "+" not in value and "#" not in value,  # [MQTT-3.3.2-14]
}
