"""Bytes of a hostile broker: no crash, no hang, no growth beyond bounds, and only the errors that are declared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_mqtt._core import session
from tests.support import packet as mqtt
from tests.support.hostile import FILTERS, besiege, valid_packets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

versions = pytest.mark.parametrize("v5", [False, True], ids=["3.1.1", "5"])


def sliced(data: bytes, sizes: list[int]) -> list[bytes]:
    """*data* in pieces of these sizes, over and over."""
    pieces, start, turn = [], 0, 0
    while start < len(data):
        end = start + sizes[turn % len(sizes)]
        pieces.append(data[start:end])
        start, turn = end, turn + 1
    return pieces


@st.composite
def conversations(draw: Callable[[Any], Any], v5: bool) -> bytes:
    """Packets that a broker may send, in any order, with some of their bytes changed, missing or doubled."""
    packets = valid_packets(v5)
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(packets), max_size=12))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        new = draw(st.binary(max_size=4))
        data[at : at + draw(st.integers(0, 4))] = new
    return bytes(data)


@versions
@given(data=st.data())
def test_spoilt_packets_in_any_slices_end_the_connection_at_worst(v5: bool, data: st.DataObject) -> None:
    stream = mqtt.connack(level=5 if v5 else 4) + data.draw(conversations(v5))
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=5))
    limit = data.draw(st.sampled_from([1, 200, 1 << 20]))
    aftermath = besiege(sliced(stream, sizes), v5=v5, max_payload_bytes=limit)
    assert aftermath.error
    assert aftermath.unread_bytes <= len(stream)


@versions
@given(noise=st.binary(max_size=300), begins_well=st.booleans())
def test_noise_ends_the_connection_at_worst(v5: bool, noise: bytes, begins_well: bool) -> None:
    connack = mqtt.connack(level=5 if v5 else 4) if begins_well else b""
    assert besiege([connack + noise], v5=v5).error


@versions
@given(noise=st.binary(max_size=300), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_noise_in_place_of_websocket_frames_ends_the_connection_at_worst(
    v5: bool, noise: bytes, sizes: list[int]
) -> None:
    connack = mqtt.connack(level=5 if v5 else 4)
    stream = bytes((0x82, len(connack))) + connack + noise
    assert besiege(sliced(stream, sizes), v5=v5, framed=True).error


@versions
def test_all_valid_packets_are_borne(v5: bool) -> None:
    """The ground that the others stand on: what they spoil is good in itself, and comes to a handler."""
    for packet in valid_packets(v5):
        aftermath = besiege([mqtt.connack(level=5 if v5 else 4), packet], v5=v5)
        assert "the broker closed the connection" in aftermath.error or packet[0] == 0xE0
        assert aftermath.handled >= (packet[0] & 0xF0 == 0x30)


# -- bounds -----------------------------------------------------------------------------------


def flood(v5: bool, count: int, packet: Callable[[int], bytes]) -> Iterator[bytes]:
    """CONNACK, and so many packets in large pieces, made as they are read."""
    yield mqtt.connack(level=5 if v5 else 4)
    for first in range(0, count, 5000):
        yield b"".join(packet(number) for number in range(first, min(first + 5000, count)))


@versions
@pytest.mark.parametrize("what", ["messages", "releases"])
def test_a_broker_that_writes_and_does_not_read_is_not_read_for_ever(
    monkeypatch: pytest.MonkeyPatch, v5: bool, what: str
) -> None:
    """Each of its packets has an answer, and answers that do not leave would fill the memory."""
    level = 5 if v5 else 4

    def packet(number: int) -> bytes:
        identifier = number % 60_000 + 1
        if what == "releases":
            return mqtt.pubrel(identifier)
        return mqtt.publish("a/b", b"", qos=1, packet_id=identifier, level=level)

    monkeypatch.setattr(session, "_MOST_UNSENT_PACKETS", 10_000)
    aftermath = besiege(flood(v5, 40_000, packet), v5=v5, reads=False)
    assert aftermath.error == "the broker does not read the answers to what it sends"
    assert aftermath.unsent_bytes < 30_000 * 5
    assert aftermath.unread_bytes < 100_000


@versions
@pytest.mark.parametrize("repeated", [False, True], ids=["new ids", "one id"])
@pytest.mark.parametrize("owes", [False, True], ids=["owes nothing", "owes some itself"])
def test_a_broker_that_does_not_wait_for_acknowledgements_is_not_read_for_ever(
    monkeypatch: pytest.MonkeyPatch, v5: bool, repeated: bool, owes: bool
) -> None:
    """In MQTT 5 it has been told our Receive Maximum; in 3.1.1 it cannot know. Handlers take their time.

    While it owes acknowledgements itself, which handlers may wait for, reading goes on; but not beyond the packet
    ids that there are.
    """
    level = 5 if v5 else 4

    def packet(number: int) -> bytes:
        identifier = 1 if repeated else number % 65_535 + 1
        return mqtt.publish("a/b", b"x", qos=1, packet_id=identifier, dup=repeated, level=level)

    monkeypatch.setattr(session, "_PACKET_IDS", 5000)
    aftermath = besiege(flood(v5, 20_000, packet), v5=v5, finishes=False, max_pending=1000, publishes=owes)
    most = 5000 if owes else 1000
    assert most <= aftermath.unacknowledged < most + 65_536 / len(packet(1)) + 1
    assert aftermath.handled <= aftermath.unacknowledged * len(FILTERS)
