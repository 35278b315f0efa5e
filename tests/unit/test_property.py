"""The properties of a PUBLISH: read as paho writes them, written as paho reads them, and no input that does harm."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_mqtt._core import property as property_module
from tars_mqtt._core.property import (
    Properties,
    decode_properties,
    encode_properties,
    subscription_identifiers,
)
from tars_mqtt._core.wire import MalformedPacketError
from tars_mqtt.errors import EncodeError
from tests.support.paho_property import pack, publish_properties, unpack

OF_A_CONNECTION = ("subscription_identifiers", "topic_alias")

# -- out ------------------------------------------------------------------------------------


@given(publish_properties)
def test_paho_reads_properties_as_they_were_given(properties: dict[str, Any]) -> None:
    """But for those of the connection that brought the message on which they were found."""
    kept = {name: value for name, value in properties.items() if name not in OF_A_CONNECTION}
    assert unpack(encode_properties(properties)) == kept


@given(publish_properties)
def test_properties_that_were_written_are_read_again(properties: dict[str, Any]) -> None:
    kept = {name: value for name, value in properties.items() if name not in OF_A_CONNECTION}
    assert decode_properties(encode_properties(properties)) == kept


@pytest.mark.parametrize(
    "pairs", [{"a": "1", "b": "2"}, [("a", "1"), ("b", "2")], iter([("a", "1"), ["b", "2"]])]
)
def test_user_properties_are_a_mapping_or_pairs(pairs: object) -> None:
    raw = encode_properties({"user_properties": pairs})
    assert decode_properties(raw) == {"user_properties": [("a", "1"), ("b", "2")]}


def test_a_name_may_stand_in_user_properties_more_than_once() -> None:
    pairs = [("a", "1"), ("a", "2")]
    assert decode_properties(encode_properties({"user_properties": pairs})) == {"user_properties": pairs}


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("message_expiry_interval", -1, "whole number from 0 to 4,294,967,295"),
        ("message_expiry_interval", 2**32, "whole number"),
        ("message_expiry_interval", 1.5, "whole number"),
        ("message_expiry_interval", "60", "whole number"),
        ("message_expiry_interval", True, "whole number"),
        ("message_expiry_interval", float("nan"), "whole number"),
        ("payload_format_indicator", 2, "whole number from 0 to 1"),
        ("content_type", b"text/plain", "must be a str, not bytes"),
        ("content_type", None, "must be a str, not NoneType"),
        ("content_type", "a\0b", r"U\+0000"),
        ("content_type", "\ud800", "surrogate"),
        ("content_type", "é" * 40_000, "80,000 bytes: 65,535 are allowed"),
        ("response_topic", "answers/+", "wildcard"),
        ("response_topic", "", "empty"),
        ("response_topic", 7, "must be a str, not int"),
        ("correlation_data", "text", "must be bytes, not str"),
        ("correlation_data", bytes(65_536), "65,536 bytes"),
        ("user_properties", 7, "pairs, of str to str"),
        ("user_properties", [("a", "b", "c")], "pairs, of str to str"),
        ("user_properties", [("a", 1)], "must be a str, not int"),
        ("user_properties", {1: "a"}, "must be a str, not int"),
        ("user_properties", {"a": "\0"}, r"U\+0000"),
    ],
)
def test_a_value_that_a_property_cannot_have_is_named(name: str, value: object, problem: str) -> None:
    with pytest.raises(EncodeError, match=problem) as caught:
        encode_properties({name: value})
    assert caught.value.path == f"properties.{name}"
    assert str(caught.value).startswith(f"properties.{name}")


@pytest.mark.parametrize("name", ["expiry", "", 7])
def test_a_property_that_there_is_not_is_told_which_there_are(name: object) -> None:
    with pytest.raises(
        EncodeError, match=f"no property {name!r} of a message: choose from message_expiry_interval, "
    ):
        encode_properties({name: 1})  # type: ignore[dict-item]


def test_what_is_no_mapping_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="mapping of names to values, not list"):
        encode_properties([("content_type", "a")])  # type: ignore[arg-type]


def test_properties_have_a_bound_together() -> None:
    pairs = [("a", "b" * 1000)] * 70
    with pytest.raises(EncodeError, match="65,535 are allowed"):
        encode_properties({"user_properties": pairs})


def test_a_whole_number_may_be_written_as_a_float() -> None:
    assert encode_properties({"message_expiry_interval": 60.0}) == b"\2\0\0\0\x3c"


# -- how long a message is worth sending ----------------------------------------------------


def test_time_that_a_message_waited_is_taken_off_its_expiry_interval() -> None:
    raw = encode_properties({"content_type": "text/plain", "message_expiry_interval": 60})
    properties = Properties.since(raw, 1000.0)
    left = [
        decode_properties(properties.at(now))["message_expiry_interval"] for now in (1000.0, 1010.5, 1059.9)
    ]
    assert left == [60, 50, 1]
    assert [properties.expired(now) for now in (1059.9, 1060.0)] == [False, True]
    assert decode_properties(properties.at(1010.0))["content_type"] == "text/plain"


def test_what_was_sent_in_time_is_repeated_with_a_second_to_live() -> None:
    properties = Properties.since(encode_properties({"message_expiry_interval": 5}), 1000.0)
    assert decode_properties(properties.at(2000.0)) == {"message_expiry_interval": 1}


@pytest.mark.parametrize("given", [{"content_type": "text/plain"}, {"message_expiry_interval": 0}])
def test_without_an_expiry_interval_nothing_expires(given: dict[str, Any]) -> None:
    """An interval of 0 is for the broker: at once, or not at all."""
    properties = Properties.since(encode_properties(given), 1000.0)
    assert not properties.expired(1e9)
    assert decode_properties(properties.at(1e9)) == given


# -- in -------------------------------------------------------------------------------------


@given(publish_properties)
def test_properties_are_read_as_paho_wrote_them(properties: dict[str, Any]) -> None:
    packed = pack(properties)
    assert decode_properties(packed) == properties
    expected = properties.get("subscription_identifiers", ())
    assert subscription_identifiers(packed) == expected
    assert subscription_identifiers(packed) == expected, "from the cache"


def test_what_brokers_pass_on_though_the_standard_does_not_allow_it_is_left_out() -> None:
    """What is left can be passed on."""
    for raw in (b"\x01\2", b"\x08\0\3a/+", b"\x08\0\1#", b"\x08\0\0"):
        assert decode_properties(raw + b"\x03\0\1x") == {"content_type": "x"}


@pytest.mark.parametrize(
    ("packed", "problem"),
    [
        (b"\x01", "ends? inside"),
        (b"\x01\x00\x01\x00", "payload_format_indicator more than once"),
        (b"\x02\0\0\0", "end inside"),
        (b"\x03\0", "end inside"),
        (b"\x03\0\2a", "end inside"),
        (b"\x03\0\1\0", "MQTT-1.5.4-2"),
        (b"\x03\0\1\xff", "MQTT-1.5.4-1"),
        (b"\x09\0\2a", "end inside"),
        (b"\x0b", "ends inside"),
        (b"\x0b\0", "identifier 0"),
        (b"\x0b\x80\x80\x80\x80\1", "more than four"),
        (b"\x23\0\0", "topic alias 0"),
        (b"\x26\0\1a\0\1", "end inside"),
        (b"\x26\0\1a", "end inside"),
        (b"\x00", "property 0x00"),
        (b"\x11\0\0\0\1", "property 0x11"),  # session expiry: of other packets
        (b"\x0b\5\xff", "property 0xff"),
    ],
)
def test_properties_that_the_standard_forbids_are_malformed_every_time(packed: bytes, problem: str) -> None:
    with pytest.raises(MalformedPacketError, match=problem):
        decode_properties(packed)
    for _ in range(2):
        with pytest.raises(MalformedPacketError, match=problem):
            subscription_identifiers(packed)


def test_many_properties_cost_no_more_than_their_number() -> None:
    """Anything quadratic would run into the timeout."""
    packed = b"\x26\0\0\0\0" * 200_000 + b"\x0b\x05"
    assert subscription_identifiers(packed) == (5,)


def test_a_stream_of_ever_new_properties_does_not_grow_the_cache() -> None:
    for number in range(2 * property_module._CACHED_IDENTIFIERS):
        subscription_identifiers(b"\x02" + number.to_bytes(4))
    assert 0 < len(property_module._identifiers) <= property_module._CACHED_IDENTIFIERS


def test_long_properties_are_not_cached() -> None:
    subscription_identifiers(b"\x09\xff\xff" + bytes(65_535))
    assert max(map(len, property_module._identifiers), default=0) <= property_module._CACHED_PROPERTIES_BYTES


@given(st.binary(max_size=60))
def test_any_bytes_are_properties_or_malformed(raw: bytes) -> None:
    for read in (decode_properties, subscription_identifiers):
        with suppress(MalformedPacketError):
            read(raw)
