"""The properties of a PUBLISH: any of them, and what paho makes of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tars_mqtt._core import wire

PAHO_NAME = {
    "payload_format_indicator": "PayloadFormatIndicator",
    "message_expiry_interval": "MessageExpiryInterval",
    "content_type": "ContentType",
    "response_topic": "ResponseTopic",
    "correlation_data": "CorrelationData",
    "topic_alias": "TopicAlias",
    "user_properties": "UserProperty",
    "subscription_identifiers": "SubscriptionIdentifier",
}

# paho refuses U+FEFF inside properties, which [MQTT-1.5.4-3] allows.
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=20)
topics = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#"), min_size=1, max_size=30)
publish_properties = st.fixed_dictionaries(
    {},
    optional={
        "payload_format_indicator": st.integers(0, 1),
        "message_expiry_interval": st.integers(0, 2**32 - 1),
        "content_type": text,
        "response_topic": topics.filter(lambda topic: "\ufeff" not in topic),
        "correlation_data": st.binary(max_size=200),
        "topic_alias": st.integers(1, 65_535),
        "user_properties": st.lists(st.tuples(text, text), min_size=1, max_size=4),
        "subscription_identifiers": st.lists(
            st.integers(1, wire.MAX_REMAINING_LENGTH), min_size=1, max_size=4
        ).map(tuple),
    },
)


def paho_properties(properties: dict[str, Any]) -> Properties:
    packed = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    for name, value in properties.items():
        setattr(packed, PAHO_NAME[name], list(value) if isinstance(value, tuple) else value)
    return packed


def pack(properties: dict[str, Any]) -> bytes:
    """Without their length."""
    packed: bytes = paho_properties(properties).pack()  # type: ignore[no-untyped-call]
    _, start = wire.decode_varint(packed)
    return packed[start:]


def said_by_paho(properties: Properties | None) -> dict[str, Any]:
    said = {name: getattr(properties, PAHO_NAME[name], None) for name in PAHO_NAME}
    if said["subscription_identifiers"] is not None:
        said["subscription_identifiers"] = tuple(said["subscription_identifiers"])
    return {name: value for name, value in said.items() if value is not None}


def unpack(raw: bytes) -> dict[str, Any]:
    """What paho reads in them."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.unpack(wire.encode_varint(len(raw)) + raw)  # type: ignore[no-untyped-call]
    return said_by_paho(properties)
