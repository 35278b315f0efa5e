"""The packets that carry messages: the same bytes as paho's, and no input that does harm."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from paho.mqtt import _packet
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.properties import VariableByteIntegers
from paho.mqtt.reasoncodes import ReasonCode

from tars_mqtt._core import wire
from tars_mqtt._core.property import decode_properties
from tars_mqtt._core.wire import MAX_REMAINING_LENGTH, MalformedPacketError
from tests.support.paho_property import pack, paho_properties, publish_properties, said_by_paho, topics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NO_LIMIT = 5 + MAX_REMAINING_LENGTH
ACKS = [wire.PUBACK, wire.PUBREC, wire.PUBREL, wire.PUBCOMP]
PROTOCOL = {False: MQTTProtocolVersion.MQTTv311, True: MQTTProtocolVersion.MQTTv5}

packet_ids = st.integers(1, 65_535)
# Payloads on both sides of each length that takes one more byte.
payloads = st.binary(max_size=40) | st.sampled_from([95, 127, 128, 300, 16_350, 16_390, 2_097_160]).map(bytes)
messages = st.fixed_dictionaries(
    {
        "topic": topics,
        "payload": payloads,
        "qos": st.integers(0, 2),
        "retain": st.booleans(),
        "dup": st.booleans(),
        "packet_id": packet_ids,
        "v5": st.booleans(),
        "properties": publish_properties,
    }
)


# -- what paho makes of it ------------------------------------------------------------------


def sent_by_paho(send: Callable[[Client], object], v5: bool) -> bytes:
    client = Client(CallbackAPIVersion.VERSION2, protocol=PROTOCOL[v5])
    packets: list[bytes] = []
    client._packet_queue = lambda command, packet, *rest: packets.append(bytes(packet))  # type: ignore[method-assign,assignment,return-value]
    client._sock = object()  # type: ignore[assignment]
    send(client)
    client._sock = None
    (packet,) = packets
    return packet


def encode(message: dict[str, Any]) -> bytes:
    qos = message["qos"]
    return wire.encode_publish(
        message["topic"].encode(),
        message["payload"],
        qos,
        message["retain"],
        message["dup"] and qos > 0,
        message["packet_id"],
        message["v5"],
        pack(message["properties"]) if message["v5"] else b"",
    )


def split_one(packet: bytes) -> tuple[int, bytes]:
    ((first, start, end),), consumed, _ = wire.split_packets(packet, NO_LIMIT)
    assert consumed == end == len(packet)
    return first, packet[start:end]


# -- PUBLISH --------------------------------------------------------------------------------


@given(messages)
def test_a_publish_is_encoded_as_paho_encodes_it(message: dict[str, Any]) -> None:
    qos, v5 = message["qos"], message["v5"]
    expected = sent_by_paho(
        lambda client: client._send_publish(
            message["packet_id"],
            message["topic"].encode(),
            message["payload"],
            qos,
            message["retain"],
            message["dup"] and qos > 0,
            properties=paho_properties(message["properties"]),
        ),
        v5,
    )
    assert encode(message) == expected


@given(messages)
def test_a_publish_is_decoded_to_what_was_encoded(message: dict[str, Any]) -> None:
    qos, v5 = message["qos"], message["v5"]
    decoded = wire.decode_publish(*split_one(encode(message)), v5)
    assert decoded == (
        message["topic"],
        message["payload"],
        qos,
        message["retain"],
        message["dup"] and qos > 0,
        message["packet_id"] if qos else 0,
        pack(message["properties"]) if v5 else b"",
    )
    assert [type(part) for part in decoded] == [str, bytes, int, bool, bool, int, bytes]
    assert decode_properties(decoded[6]) == (message["properties"] if v5 else {})


@given(messages, st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=3), st.integers(0, 60))
def test_a_damaged_publish_that_is_accepted_reads_the_same_to_paho(
    message: dict[str, Any], damage: list[tuple[int, int]], lost: int
) -> None:
    """Nothing is accepted that paho refuses, and nothing is read differently."""
    v5 = message["v5"]
    first, undamaged = split_one(encode(message))
    body = bytearray(undamaged)
    for position, value in damage:
        body[position % len(body)] = value
    del body[len(body) - lost % len(body) :]
    try:
        topic, payload, qos, retain, dup, packet_id, properties = wire.decode_publish(first, body, v5)
        said = decode_properties(properties)
    except MalformedPacketError:
        return
    assume("\ufeff" not in repr(said))
    known = _packet.decode_publish(first, bytes(body), PROTOCOL[v5])
    assert (known.topic, known.payload, known.qos) == (topic.encode(), payload, qos)
    assert (known.retain, known.dup, known.mid) == (retain, dup, packet_id)
    assert said_by_paho(known.properties) == said


@pytest.mark.parametrize("length", [127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
def test_a_length_takes_as_few_bytes_as_it_can(length: int) -> None:
    packet = wire.encode_publish(b"t", bytes(length - 3), 0, False, False, 0, False)
    encoded = wire.encode_varint(length)
    assert encoded == VariableByteIntegers.encode(length)
    assert packet[1 : 1 + len(encoded)] == encoded
    assert wire.decode_publish(*split_one(packet), False)[1] == bytes(length - 3)


def test_what_the_protocol_cannot_say_is_a_value_error() -> None:
    assert wire.encode_varint(MAX_REMAINING_LENGTH) == b"\xff\xff\xff\x7f"
    with pytest.raises(ValueError, match="268,435,456 does not fit"):
        wire.encode_publish(b"t", bytes(MAX_REMAINING_LENGTH - 2), 0, False, False, 0, False)
    with pytest.raises(ValueError, match="does not fit"):
        wire.encode_varint(-1)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_payload_is_bytes_whatever_it_arrives_in(kind: Callable[[bytes], Any]) -> None:
    decoded = wire.decode_publish(0x32, kind(b"\0\1a\0\7\2\x0b\5payload"), True)
    assert decoded == ("a", b"payload", 1, False, False, 7, b"\x0b\5")
    assert type(decoded[1]) is bytes


@pytest.mark.parametrize("v5", [False, True])
@pytest.mark.parametrize(
    ("topic", "problem"),
    [
        (b"", "MQTT-4.7.3-1"),
        (b"a/+", "MQTT-3.3.2-2"),
        (b"a/#", "MQTT-3.3.2-2"),
        (b"a\0b", "MQTT-1.5.4-2"),
        (b"\xff", "MQTT-1.5.4-1"),
        (b"\xc0\x80", "MQTT-1.5.4-1"),
        (b"\xed\xa0\x80", "MQTT-1.5.4-1"),
    ],
)
def test_a_topic_that_is_none_is_malformed_every_time(topic: bytes, problem: str, v5: bool) -> None:
    body = len(topic).to_bytes(2, "big") + topic + b"\0payload"
    for _ in range(2):
        with pytest.raises(MalformedPacketError, match=problem):
            wire.decode_publish(wire.PUBLISH, body, v5)


@pytest.mark.parametrize("body", [b"\0\3", b"\0\4cut", b"\0\4cu\xe2", b"\xff\xffcut"])
def test_a_topic_that_is_cut_off_is_called_so(body: bytes) -> None:
    """And neither empty nor ill-formed, which would send the reader of the log the wrong way."""
    with pytest.raises(MalformedPacketError, match="ends inside its topic"):
        wire.decode_publish(wire.PUBLISH, body, True)


def test_a_topic_that_is_cached_does_not_hide_a_packet_that_ends_too_soon() -> None:
    wire.decode_publish(wire.PUBLISH, b"\0\3abc", False)
    with pytest.raises(MalformedPacketError, match=r"3\.3\.2"):
        wire.decode_publish(wire.PUBLISH, b"\0\4abc", False)


@pytest.mark.parametrize("v5", [False, True])
def test_a_publish_that_ends_inside_its_header_is_malformed(v5: bool) -> None:
    header = b"\0\3a/b\1\1" + (b"\x80\1" + b"\x26\0\2ab\0\x79" + bytes(121) if v5 else b"")
    assert wire.decode_publish(0x32, header, v5)[:2] == ("a/b", b"")
    for size in range(len(header)):
        with pytest.raises(MalformedPacketError):
            wire.decode_publish(0x32, header[:size], v5)


@pytest.mark.parametrize("first", [0x32, 0x34])
def test_packet_identifier_0_is_a_protocol_error(first: int) -> None:
    with pytest.raises(MalformedPacketError, match=r"MQTT-2\.2\.1-4"):
        wire.decode_publish(first, b"\0\1a\0\0\0", True)


@pytest.mark.parametrize(
    ("first", "problem"),
    [(flags | 0x30, "MQTT-3.3.1-4") for flags in (0x6, 0x7, 0xE, 0xF)]
    + [(flags | 0x30, "MQTT-3.3.1-2") for flags in (0x8, 0x9)],
)
def test_flags_that_contradict_themselves_are_malformed(first: int, problem: str) -> None:
    with pytest.raises(MalformedPacketError, match=problem):
        wire.decode_publish(first, b"\0\1a\0\7\0", True)
    with pytest.raises(MalformedPacketError, match=problem):
        wire.split_packets(bytes((first, 6)) + b"\0\1a\0\7\0", NO_LIMIT)


def test_a_stream_of_ever_new_topics_does_not_grow_the_cache() -> None:
    for number in range(2 * wire._CACHED_TOPICS):
        topic = f"t/{number}".encode()
        wire.decode_publish(wire.PUBLISH, len(topic).to_bytes(2, "big") + topic, False)
    assert 0 < len(wire._topics) <= wire._CACHED_TOPICS


def test_a_long_topic_is_not_cached() -> None:
    wire.decode_publish(wire.PUBLISH, b"\xff\xff" + b"t" * 65_535, False)
    assert max(map(len, wire._topics)) <= wire._CACHED_TOPIC_BYTES


# -- acknowledgements -----------------------------------------------------------------------


@given(st.sampled_from(ACKS), packet_ids, st.booleans())
def test_an_acknowledgement_is_the_one_paho_sends(kind: int, packet_id: int, v5: bool) -> None:
    send = {
        wire.PUBACK: Client._send_puback,
        wire.PUBREC: Client._send_pubrec,
        wire.PUBREL: Client._send_pubrel,
        wire.PUBCOMP: Client._send_pubcomp,
    }[kind]
    packet = wire.encode_ack(kind, packet_id)
    assert packet == sent_by_paho(lambda client: send(client, packet_id), v5)
    first, body = split_one(packet)
    assert first == kind
    assert wire.decode_ack(body, v5) == (packet_id, 0)


@given(packet_ids)
def test_a_reason_is_read_by_paho_as_it_was_written(packet_id: int) -> None:
    first, body = split_one(wire.encode_ack_reason(wire.PUBCOMP, packet_id, wire.PACKET_IDENTIFIER_NOT_FOUND))
    known = _packet.decode_pubcomp(first, body, MQTTProtocolVersion.MQTTv5)
    assert (known.mid, known.reason.value) == (packet_id, 0x92)
    assert wire.decode_ack(body, True) == (packet_id, 0x92)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"\1\2", (0x0102, 0)),
        (b"\1\2\x10", (0x0102, 0x10)),
        (b"\1\2\x87\0", (0x0102, 0x87)),
        (b"\1\2\x87\5\x1f\0\2no", (0x0102, 0x87)),
    ],
)
def test_an_acknowledgement_may_say_why(body: bytes, expected: tuple[int, int]) -> None:
    assert wire.decode_ack(body, True) == expected


@pytest.mark.parametrize(
    ("body", "v5", "problem"),
    [
        (b"", True, "0 bytes"),
        (b"\1", True, "1 bytes"),
        (b"\1", False, "1 bytes"),
        (b"\1\2\0", False, "3 bytes"),
        (b"\0\0", True, "MQTT-2.2.1-5"),
        (b"\0\0", False, "MQTT-2.2.1-5"),
        (b"\1\2\x87\5\x1f\0\2n", True, r"3\.4\.2\.2"),
        (b"\1\2\x87\0\0", True, r"3\.4\.2\.2"),
        (b"\1\2\x87\x80", True, r"1\.5\.5"),
    ],
)
def test_an_acknowledgement_of_the_wrong_shape_is_malformed(body: bytes, v5: bool, problem: str) -> None:
    with pytest.raises(MalformedPacketError, match=problem):
        wire.decode_ack(body, v5)


# -- the byte stream ------------------------------------------------------------------------


def receive(chunks: Iterable[bytes], limit: int) -> tuple[list[tuple[int, bytes]], str, bytes]:
    """What a connection makes of its reads: the packets, the error that ended it, and what is left."""
    packets: list[tuple[int, bytes]] = []
    buffer = b""
    needed = 0
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= needed:
            try:
                found, consumed, needed = wire.split_packets(buffer, limit)
            except MalformedPacketError as error:
                return packets, str(error), b""
            packets += [(first, buffer[start:end]) for first, start, end in found]
            buffer = buffer[consumed:]
    return packets, "", buffer


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    packet = st.one_of(
        messages.map(encode).filter(lambda packet: len(packet) < 1000),
        st.builds(wire.encode_ack, st.sampled_from(ACKS), packet_ids),
        st.just(b"\xd0\x00"),
        st.just(b"\x30\x81\x80\x00\0"),
        st.just(b"\x30\x80\x80\x80\x00"),
    )
    stream = b"".join(draw(st.lists(packet, max_size=8)))
    return stream + draw(st.binary(max_size=8))


@given(streams(), st.lists(st.integers(0, 3000), max_size=12), st.sampled_from([60, NO_LIMIT]))
@example(b"\x40\x02\0\1\x00\x00\x40\x02\0\2", [5], NO_LIMIT)
def test_chunking_never_changes_what_comes_out(stream: bytes, cuts: list[int], limit: int) -> None:
    """The packets before a malformed one come out too, however they arrive."""
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    chunks = [stream[start:end] for start, end in pairwise(edges)]
    whole = receive([stream], limit)
    assert receive(chunks, limit) == whole
    assert receive([stream[i : i + 1] for i in range(len(stream))], limit) == whole


@given(messages, st.binary(max_size=3))
def test_an_incomplete_packet_says_how_long_it_will_be(message: dict[str, Any], before: bytes) -> None:
    packet = encode(message)
    assume(len(packet) < 1000)
    header = 1 + len(wire.encode_varint(len(split_one(packet)[1])))
    front = b"\xd0\x00" * len(before)
    for size in range(len(packet)):
        found, consumed, needed = wire.split_packets(front + packet[:size], NO_LIMIT)
        assert (len(found), consumed) == (len(before), len(front))
        if size < header:
            assert size < needed <= len(packet)
        else:
            assert needed == len(packet)


@given(st.binary(max_size=300), st.integers(0, 300), st.booleans())
def test_packets_lie_side_by_side(buffer: bytes, limit: int, v5: bool) -> None:
    try:
        packets, consumed, needed = wire.split_packets(bytearray(buffer), limit, v5)
    except MalformedPacketError:
        return
    end = 0
    for first, body_start, body_end in packets:
        assert first == buffer[end]
        assert end + 2 <= body_start <= min(end + 5, body_end)
        assert body_end - end <= limit
        end = body_end
    assert consumed == end <= len(buffer)
    assert needed == 0 or needed > len(buffer) - consumed


LEGAL = (
    {0x20, 0x40, 0x50, 0x62, 0x70, 0x90, 0xB0, 0xD0, 0xE0}  # of what a server may send
    | {0x30, 0x31}
    | {0x32, 0x33, 0x34, 0x35, 0x3A, 0x3B, 0x3C, 0x3D}
)


@pytest.mark.parametrize("v5", [False, True])
def test_a_packet_begins_with_a_type_and_its_flags_or_is_malformed(v5: bool) -> None:
    for first in range(256):
        packet = bytes((first, 0))
        if first in LEGAL or (v5 and first == 0xF0):
            assert wire.split_packets(packet, NO_LIMIT, v5) == ([(first, 2, 2)], 2, 1)
        else:
            with pytest.raises(MalformedPacketError, match=r"MQTT-2\.1\.3-1|MQTT-3\.3\.1"):
                wire.split_packets(packet, NO_LIMIT, v5)


def test_a_packet_above_the_limit_is_refused_before_its_body_arrives() -> None:
    header = b"\x30\xc8\x01"  # 200 bytes follow
    assert wire.split_packets(header, 203) == ([], 0, 203)
    assert wire.split_packets(header + bytes(200), 203)[0] == [(0x30, 3, 203)]
    for packet in (header, header + bytes(200), b"\xf0\xc8\x01"):
        with pytest.raises(wire.PacketTooLargeError, match="body of 200 bytes, above the limit of 202"):
            wire.split_packets(packet, 202)


def test_a_length_of_more_than_four_bytes_is_malformed() -> None:
    assert wire.split_packets(b"\x30\xff\xff\xff\x7f", NO_LIMIT) == ([], 0, NO_LIMIT)
    for header in (b"\x30\xff\xff\xff\xff", b"\x30\x80\x80\x80\x80\x00"):
        with pytest.raises(MalformedPacketError, match="more than four bytes") as caught:
            wire.split_packets(header, NO_LIMIT)
        assert not isinstance(caught.value, wire.PacketTooLargeError)


@given(st.integers(0, MAX_REMAINING_LENGTH), st.binary(max_size=3), st.binary(max_size=3))
def test_a_variable_byte_integer_survives_the_way_there_and_back(
    value: int, before: bytes, after: bytes
) -> None:
    encoded = wire.encode_varint(value)
    assert encoded == VariableByteIntegers.encode(value)
    assert wire.decode_varint(before + encoded + after, len(before)) == (value, len(before + encoded))


@pytest.mark.parametrize(
    ("encoded", "problem"),
    [
        (b"", r"1\.5\.5"),
        (b"\xff\xff", r"ends inside"),
        (b"\x80\x80\x80\x80", "more than four"),
        (b"\x81\x00", "MQTT-1.5.5-1"),
    ],
)
def test_a_variable_byte_integer_that_is_none_is_malformed(encoded: bytes, problem: str) -> None:
    with pytest.raises(MalformedPacketError, match=problem):
        wire.decode_varint(encoded)


# -- any bytes ------------------------------------------------------------------------------


@given(st.integers(0, 255), st.binary(max_size=60), st.booleans())
@example(0x3A, b"", True)
@example(0x32, b"\0\1a\0", False)
def test_any_bytes_are_a_result_or_malformed(first: int, body: bytes, v5: bool) -> None:
    readers: list[Callable[[], object]] = [
        lambda: wire.decode_publish(first, body, v5),
        lambda: wire.decode_ack(body, v5),
        lambda: wire.decode_varint(body),
        lambda: wire.split_packets(bytes((first,)) + body, 50, v5),
    ]
    for read in readers:
        with suppress(MalformedPacketError):
            read()


# -- reasons --------------------------------------------------------------------------------


def test_every_failure_that_paho_knows_has_its_name_in_the_standard() -> None:
    """Where paho's words are not the standard's, the standard's are written out here."""
    standard = {
        0x9E: "shared subscriptions not supported",
        0xA2: "wildcard subscriptions not supported",
    }
    failures = {code: names for code, names in ReasonCode.names.items() if code >= 0x80}
    for code, names in failures.items():
        assert {wire.reason_name(code).lower()} == {standard.get(code, name.lower()) for name in names}
    assert len(failures) >= 30


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0x80, "Unspecified error"),
        (0x8E, "Session taken over"),
        (0xA2, "Wildcard Subscriptions not supported"),
        (0xA3, "unknown reason 0xa3"),
        (0x7F, "unknown reason 0x7f"),
        (0x05, "unknown reason 0x05"),
    ],
)
def test_a_failure_is_named_in_the_words_of_the_standard(code: int, name: str) -> None:
    assert wire.reason_name(code) == name
