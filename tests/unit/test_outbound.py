"""The way out: in what order it leaves, how much at a time, and what the broker's answers mean."""

from __future__ import annotations

import logging
import math
from concurrent.futures import CancelledError

import pytest

from tars_mqtt._core import wire
from tars_mqtt._core.outbound import _ENOUGH_UNSENT
from tars_mqtt.errors import PublishRejectedError
from tests.support import PacketType
from tests.support import packet as mqtt
from tests.support.packet import Property
from tests.support.way_out import Harness


@pytest.fixture
def harness() -> Harness:
    harness = Harness()
    harness.connect()
    return harness


# -- the window ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_inflight", "receive_maximum", "window"), [(3, 65_535, 3), (64, 2, 2), (1, 10, 1)]
)
def test_no_more_than_a_window_is_unacknowledged(
    max_inflight: int, receive_maximum: int, window: int
) -> None:
    harness = Harness(max_inflight=max_inflight)
    harness.connect(receive_maximum=receive_maximum)
    messages = [harness.submit(b"%d" % number) for number in range(6)]
    assert len(harness.pump()) == window
    assert harness.pump() == []
    assert harness.outbound.inflight == window
    harness.acknowledge(messages[0])
    assert harness.payloads() == [b"%d" % window]


def test_qos_2_holds_its_place_in_the_window_until_it_is_complete() -> None:
    harness = Harness(max_inflight=1)
    harness.connect()
    first, second = harness.submit(qos=2), harness.submit(b"next", qos=2)
    harness.pump()
    assert harness.acknowledge(first, kind=wire.PUBREC) == mqtt.pubrel(first.packet_id)
    assert harness.pump() == []
    assert not first.receipt.done()
    harness.acknowledge(first, kind=wire.PUBCOMP)
    assert first.receipt.done()
    assert harness.payloads() == [b"next"]
    assert not second.receipt.done()


def test_qos_0_needs_no_place_in_the_window() -> None:
    harness = Harness(max_inflight=1)
    harness.connect()
    harness.submit(b"1")
    harness.submit(b"2")
    harness.submit(b"0", qos=0)
    assert sorted(harness.payloads()) == [b"0", b"1"]
    harness.submit(b"00", qos=0)
    assert harness.payloads() == [b"00"]


@pytest.mark.parametrize(("window", "patience"), [(1, 0.0), (63, 0.0), (64, 0.00008), (80, 0.00008)])
def test_what_is_read_may_gather_for_long_only_while_no_message_waits_for_room(
    window: int, patience: float
) -> None:
    """A small window does not keep the broker busy for as long as a short sleep takes."""
    harness = Harness(max_inflight=window)
    harness.connect()
    first, *_ = (harness.submit() for _ in range(window))
    harness.pump()
    assert harness.outbound.patience == math.inf, "nothing stands behind them"
    harness.submit()
    assert harness.outbound.patience == patience
    harness.acknowledge(first)
    assert harness.outbound.patience == math.inf, "the next may go"


def test_a_socket_that_is_full_is_given_no_more(harness: Harness) -> None:
    """What waits here is counted and bounded; what waits in the stream is not."""
    harness.submit()
    harness.submit(qos=0)
    assert harness.pump(unsent_bytes=_ENOUGH_UNSENT) == []
    assert len(harness.pump(unsent_bytes=_ENOUGH_UNSENT - 10)) >= 1


def test_a_flood_of_qos_0_leaves_room_for_qos_1_and_the_other_way_round() -> None:
    for flood, other in ((0, 1), (1, 0)):
        harness = Harness(max_inflight=1000, max_queued=1000, max_queued_bytes=1 << 30)
        harness.connect()
        for _ in range(20):
            harness.submit(b"x" * (_ENOUGH_UNSENT // 4), qos=flood)
        harness.submit(b"other", qos=other)
        assert b"other" in harness.payloads()


@pytest.mark.parametrize("qos", [0, 1])
def test_more_than_the_socket_takes_at_once_is_written_in_several_goes(qos: int) -> None:
    """And as long as there is more, the network thread does not go to sleep."""
    harness = Harness(max_queued=1000, max_inflight=1000, max_queued_bytes=1 << 30)
    harness.connect()
    for number in range(20):
        harness.submit(b"%02d" % number + b"x" * (_ENOUGH_UNSENT // 4), qos=qos)
    written: list[bytes] = []
    goes = 0
    while payloads := harness.payloads():
        goes += 1
        assert sum(map(len, payloads)) <= 2 * _ENOUGH_UNSENT
        written += payloads
        assert harness.more or len(written) == 20
    assert goes > 2
    assert [payload[:2] for payload in written] == [b"%02d" % number for number in range(20)]


def test_packet_ids_go_round_and_pass_over_those_in_use() -> None:
    harness = Harness(max_inflight=10)
    harness.connect()
    slow = harness.submit(b"slow")
    harness.pump()
    harness.outbound._packet_id = 65_534
    last, first = harness.submit(), harness.submit()
    harness.pump()
    assert last.packet_id == 65_535
    assert first.packet_id == slow.packet_id + 1


# -- acknowledgements ---------------------------------------------------------------------


def test_an_acknowledgement_of_something_else_settles_nothing(harness: Harness) -> None:
    one, two = harness.submit(qos=1), harness.submit(qos=2)
    harness.pump()
    assert harness.outbound.acknowledged(wire.PUBACK, 60_000, 0) is None
    assert harness.acknowledge(two, kind=wire.PUBACK) is None
    assert harness.acknowledge(one, kind=wire.PUBCOMP) is None
    assert not one.receipt.done()
    assert not two.receipt.done()


def test_what_no_broker_sends_acknowledges_nothing(harness: Harness) -> None:
    message = harness.submit(qos=2)
    harness.pump()
    assert harness.acknowledge(message, kind=0x80) is None
    assert not message.receipt.done()


def test_what_a_publisher_sent_and_did_not_leave_whole_is_counted_as_lost(harness: Harness) -> None:
    harness.outbound.disconnected(by_broker=True, cut_short=1)
    assert harness.counters.dropped() == {"connection_lost": 1}


def test_a_repeated_acknowledgement_is_no_second_one(harness: Harness) -> None:
    message = harness.submit()
    harness.pump()
    harness.acknowledge(message)
    harness.acknowledge(message)
    assert harness.outbound.acknowledged_count == 1
    assert harness.held() == (0, 0)


def test_a_rejection_fails_the_receipt_in_the_words_of_the_standard(harness: Harness, caplog) -> None:
    message = harness.submit(b"secret", topic=b"forbidden/topic")
    harness.pump()
    with caplog.at_level(logging.WARNING, "tars_mqtt.publish"):
        harness.acknowledge(message, 0x87)
    with pytest.raises(PublishRejectedError, match="not authorized|Not authorized") as caught:
        message.receipt.result(0)
    assert caught.value.code == 0x87
    assert "forbidden/topic" in str(caught.value)
    assert "forbidden/topic" in caplog.text
    assert "secret" not in caplog.text
    assert harness.counters.totals()["rejected"] == 1
    assert harness.outbound.acknowledged_count == 0


def test_no_matching_subscribers_is_a_success(harness: Harness) -> None:
    message = harness.submit()
    harness.pump()
    harness.acknowledge(message, 0x10)
    assert message.receipt.result(0) == "id"


def test_a_pubrec_with_an_error_ends_the_message(harness: Harness) -> None:
    """No PUBREL follows it [MQTT-4.3.3]."""
    message = harness.submit(qos=2)
    harness.pump()
    assert harness.acknowledge(message, 0x97, wire.PUBREC) is None
    with pytest.raises(PublishRejectedError, match="(?i)quota exceeded"):
        message.receipt.result(0)


def test_a_repeated_pubrec_is_answered_again(harness: Harness) -> None:
    message = harness.submit(qos=2)
    harness.pump()
    for _ in range(2):
        assert harness.acknowledge(message, kind=wire.PUBREC) == mqtt.pubrel(message.packet_id)


@pytest.mark.parametrize(("v5", "reason"), [(True, 0x92), (False, None)])
def test_a_pubrec_of_an_unknown_message_is_released(v5: bool, reason: int | None) -> None:
    """Otherwise the broker would keep it for ever. "Packet identifier not found" exists in MQTT 5 only."""
    harness = Harness()
    harness.connect(v5=v5)
    assert harness.outbound.acknowledged(wire.PUBREC, 20_000, 0) == mqtt.pubrel(20_000, reason)


# -- after a reconnect --------------------------------------------------------------------


def test_what_was_interrupted_goes_again_first_in_order_marked_as_repetition() -> None:
    """With the same packet ids: the broker knows by them what it has already [MQTT-4.4.0-1]."""
    harness = Harness(max_inflight=3)
    harness.connect()
    messages = [harness.submit(b"%d" % number) for number in range(5)]
    ids = [publish.packet_id for publish in harness.publishes()]
    harness.acknowledge(messages[1])
    harness.reconnect(resumed=True)
    again = harness.publishes()
    assert [(publish.payload, publish.dup) for publish in again] == [
        (b"0", True),
        (b"2", True),
        (b"3", False),
    ]
    assert [publish.packet_id for publish in again[:2]] == [ids[0], ids[2]]
    assert harness.counters.totals()["retried"] == 2


def test_nothing_is_marked_as_repetition_where_the_broker_forgot_the_session() -> None:
    harness = Harness(max_inflight=2)
    harness.connect()
    messages = [harness.submit(b"%d" % number, qos=1 + number % 2) for number in range(3)]
    harness.pump()
    harness.reconnect(resumed=False)
    again = harness.publishes()
    assert [(publish.payload, publish.dup) for publish in again] == [(b"0", False), (b"1", False)]
    for message in messages[:2]:
        if message.qos == 1:
            harness.acknowledge(message)
        else:
            harness.acknowledge(message, kind=wire.PUBREC)
            harness.acknowledge(message, kind=wire.PUBCOMP)
        assert message.receipt.result(0) == "id"


def test_qos_2_that_the_broker_has_is_released_and_not_sent_again() -> None:
    harness = Harness()
    harness.connect()
    message = harness.submit(qos=2)
    harness.pump()
    harness.acknowledge(message, kind=wire.PUBREC)
    harness.reconnect(resumed=True)
    (packet,) = harness.pump()
    assert packet == (PacketType.PUBREL, 2, message.packet_id.to_bytes(2))
    harness.acknowledge(message, kind=wire.PUBCOMP)
    assert message.receipt.done()


def test_a_release_that_the_broker_had_already_ends_a_message_well() -> None:
    """Its PUBCOMP was lost on the way: the id is gone there, because the message has been published."""
    harness = Harness()
    harness.connect()
    message = harness.submit(qos=2)
    harness.pump()
    harness.acknowledge(message, kind=wire.PUBREC)
    harness.reconnect(resumed=True)
    harness.pump()
    harness.acknowledge(message, wire.PACKET_IDENTIFIER_NOT_FOUND, wire.PUBCOMP)
    assert message.receipt.result(0) == "id"


def test_a_repetition_whose_id_is_in_use_has_arrived_before() -> None:
    """Some brokers say so where others repeat their PUBREC. To a first sending it is a refusal."""
    harness = Harness()
    harness.connect()
    message = harness.submit(qos=2)
    harness.pump()
    harness.reconnect(resumed=True)
    harness.pump()
    released = harness.acknowledge(message, wire.PACKET_IDENTIFIER_IN_USE, wire.PUBREC)
    assert released == mqtt.pubrel(message.packet_id)
    harness.acknowledge(message, kind=wire.PUBCOMP)
    assert message.receipt.result(0) == "id"
    other = harness.submit(qos=2)
    harness.pump()
    assert harness.acknowledge(other, wire.PACKET_IDENTIFIER_IN_USE, wire.PUBREC) is None
    with pytest.raises(PublishRejectedError):
        other.receipt.result(0)


def test_qos_2_that_the_broker_had_before_it_forgot_the_session_is_sent_again() -> None:
    harness = Harness()
    harness.connect()
    message = harness.submit(b"twice at worst", qos=2)
    harness.pump()
    harness.acknowledge(message, kind=wire.PUBREC)
    harness.reconnect(resumed=False)
    (publish,) = harness.publishes()
    assert (publish.payload, publish.dup) == (b"twice at worst", False)


def test_a_session_lost_on_the_second_reconnect_is_noticed_for_what_the_first_did_not_reach() -> None:
    """A release for a message that the broker has forgotten would be its end."""
    harness = Harness()
    harness.connect()
    first, second = harness.submit(b"first", qos=2), harness.submit(b"second", qos=1)
    harness.pump()
    harness.acknowledge(first, kind=wire.PUBREC)
    harness.reconnect(resumed=True)  # and nothing is written
    harness.reconnect(resumed=False)
    again = harness.publishes()
    assert [(publish.payload, publish.dup) for publish in again] == [(b"first", False), (b"second", False)]
    assert [publish.packet_id for publish in again] == [first.packet_id, second.packet_id]
    assert not first.receipt.done()


def test_order_survives_many_reconnects() -> None:
    harness = Harness(max_inflight=2)
    harness.connect()
    messages = [harness.submit(b"%d" % number) for number in range(4)]
    for resumed in (True, False, True, True):
        assert harness.payloads() == [b"0", b"1"]
        harness.reconnect(resumed)
    for message in messages[:2]:
        harness.pump()
        harness.acknowledge(message)
    assert harness.payloads() == [b"3"], "2 went when 0 was acknowledged"


def test_a_smaller_window_after_a_reconnect_is_kept_to() -> None:
    harness = Harness(max_inflight=5)
    harness.connect()
    messages = [harness.submit(b"%d" % number) for number in range(5)]
    harness.pump()
    harness.reconnect(resumed=True, receive_maximum=2)
    assert harness.payloads() == [b"0", b"1"]
    harness.acknowledge(messages[0])
    assert harness.payloads() == [b"2"]


def test_qos_0_that_waited_is_lost_with_the_connection_and_counted(harness: Harness, caplog) -> None:
    for _ in range(3):
        harness.submit(qos=0)
    with caplog.at_level(logging.WARNING, "tars_mqtt.publish"):
        harness.disconnect()
    assert harness.counters.dropped() == {"connection_lost": 3}
    assert "lost up to 3 messages of QoS 0" in caplog.text
    harness.connect(resumed=True)
    assert harness.payloads() == []


def test_qos_0_that_had_not_left_the_socket_is_counted_as_lost(harness: Harness) -> None:
    harness.submit(qos=0)
    harness.pump()
    harness.disconnect()
    assert harness.counters.dropped() == {"connection_lost": 1}


def test_qos_0_that_had_left_is_not_counted_as_lost(harness: Harness) -> None:
    harness.submit(qos=0)
    harness.pump()
    harness.pump(unsent_bytes=0)
    harness.disconnect()
    assert harness.counters.dropped() == {}


def test_qos_0_that_left_with_the_goodbye_is_not_counted_as_lost(harness: Harness) -> None:
    harness.submit(qos=0)
    harness.pump()
    harness.outbound.all_sent()
    harness.disconnect(by_broker=False)
    assert harness.counters.dropped() == {}


# -- what can never be sent ---------------------------------------------------------------


def test_a_packet_larger_than_the_broker_takes_is_rejected_and_not_sent() -> None:
    """[MQTT-3.2.2-15]: sending it would cost the connection, again and again."""
    harness = Harness()
    harness.connect(maximum_packet_size=20)
    fits = b"x" * (20 - 2 - 3 - 2 - 1)
    too_large = harness.submit(fits + b"x")
    harness.submit(fits)
    (publish,) = harness.publishes()
    assert publish.payload == fits
    with pytest.raises(PublishRejectedError, match="21 bytes, the broker takes 20") as caught:
        too_large.receipt.result(0)
    assert caught.value.code is None
    assert harness.counters.totals()["rejected"] == 1


def test_qos_0_that_the_broker_would_not_take_is_rejected_at_once() -> None:
    """Nobody holds a receipt that could tell it later."""
    harness = Harness()
    harness.connect(maximum_packet_size=20, retain_available=False)
    fits = b"x" * (20 - 2 - 3 - 1)
    harness.submit(fits, qos=0)
    with pytest.raises(PublishRejectedError, match="21 bytes, the broker takes 20"):
        harness.submit(fits + b"x", qos=0)
    with pytest.raises(PublishRejectedError, match="retain not supported"):
        harness.submit(b"", qos=0, retain=True)
    assert harness.payloads() == [fits]
    assert harness.held() == (0, 0)


def test_qos_0_is_written_in_the_version_of_its_connection(harness: Harness) -> None:
    """Two publishers at the same time as a reconnect: the packet is made for the connection that takes it."""
    for v5 in (True, False):
        harness.connect(v5)
        harness.submit(b"%d" % v5, qos=0)
        assert harness.payloads() == [b"%d" % v5]
        harness.disconnect()


def test_a_qos_that_the_broker_does_not_have_is_rejected() -> None:
    harness = Harness()
    harness.connect(maximum_qos=1)
    two, one = harness.submit(qos=2), harness.submit(qos=1)
    assert len(harness.pump()) == 1
    with pytest.raises(PublishRejectedError, match="the broker takes QoS 1 at most"):
        two.receipt.result(0)
    assert not one.receipt.done()


def test_retain_where_the_broker_keeps_nothing_is_rejected() -> None:
    harness = Harness()
    harness.connect(retain_available=False)
    kept = harness.submit(retain=True)
    assert harness.pump() == []
    with pytest.raises(PublishRejectedError, match="retain not supported"):
        kept.receipt.result(0)


def broken_over(harness: Harness, payload: bytes) -> bool:
    """The broker hangs up on this payload and acknowledges everything else; True when it was sent."""
    publishes = harness.publishes()
    sent = payload in [publish.payload for publish in publishes]
    for publish in publishes:
        if not sent:
            harness.outbound.acknowledged(wire.PUBACK, publish.packet_id, 0)
    if sent:
        harness.reconnect(resumed=True, by_broker=True)
    return sent


def test_a_message_over_which_the_broker_hangs_up_is_found_and_fails_and_the_others_go() -> None:
    """MQTT 3.1.1 has no way to say that a packet is too large."""
    harness = Harness()
    harness.connect(v5=False)
    messages = [harness.submit(b"x" * size) for size in (3, 500, 2)]
    times = 0
    while not all(message.receipt.done() for message in messages):
        times += broken_over(harness, b"x" * 500)
        assert times < 10
    assert times == 4
    with pytest.raises(PublishRejectedError, match="closed the connection each of the 4 times"):
        messages[1].receipt.result(0)
    assert messages[0].receipt.result(0) == messages[2].receipt.result(0) == "id"
    assert (harness.held(), harness.outbound.inflight) == ((0, 0), 0)


def test_a_message_is_not_blamed_for_a_connection_that_we_gave_up() -> None:
    harness = Harness()
    harness.connect()
    message = harness.submit(b"x" * 500)
    for _ in range(10):
        assert harness.payloads() == [b"x" * 500]
        harness.reconnect(resumed=True, by_broker=False)
    assert not message.receipt.done()


def test_a_message_no_larger_than_one_that_arrived_is_not_blamed() -> None:
    harness = Harness()
    harness.connect()
    larger = harness.submit(b"x" * 500)
    harness.pump()
    harness.acknowledge(larger)
    messages = [harness.submit(b"x" * 499), harness.submit(b"x" * 498)]
    for _ in range(10):
        assert len(harness.payloads()) == 2, "side by side, not one alone"
        harness.reconnect(resumed=True, by_broker=True)
    assert not messages[0].receipt.done()


# -- taking back --------------------------------------------------------------------------


def test_a_message_taken_back_in_time_is_not_sent() -> None:
    harness = Harness()
    messages = [harness.submit(b"%d" % number) for number in range(3)]
    assert messages[1].receipt.cancel()
    harness.connect()
    assert harness.payloads() == [b"0", b"2"]
    with pytest.raises(CancelledError):
        messages[1].receipt.result(0)


def test_a_message_that_was_sent_cannot_be_taken_back(harness: Harness) -> None:
    message = harness.submit()
    harness.pump()
    assert not message.receipt.cancel()
    harness.reconnect(resumed=False)
    assert not message.receipt.cancel()
    assert harness.payloads() == [b"x"]


# -- properties ---------------------------------------------------------------------------

EXPIRY = Property.MESSAGE_EXPIRY_INTERVAL
CONTENT_TYPE = Property.CONTENT_TYPE


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_message_takes_its_properties_along(harness: Harness, qos: int) -> None:
    harness.submit(qos=qos, properties={"content_type": "text/plain"})
    harness.submit(qos=qos)
    assert [publish.properties for publish in harness.publishes()] == [{CONTENT_TYPE: ["text/plain"]}, {}]


def test_properties_are_counted_where_bytes_are(harness: Harness) -> None:
    message = harness.submit(b"x", properties={"content_type": "text/plain"})
    assert harness.held() == (1, len(b"t") + len(b"x") + 1 + 2 + len("text/plain"))
    harness.pump()
    harness.acknowledge(message)
    assert harness.held() == (0, 0)


def test_what_waited_is_sent_with_the_time_that_it_has_left(harness: Harness) -> None:
    harness.disconnect()
    message = harness.submit(properties={"message_expiry_interval": 60})
    harness.clock.advance(20.0)
    harness.connect()
    assert [publish.properties for publish in harness.publishes()] == [{EXPIRY: [40]}]
    harness.clock.advance(15.0)
    harness.reconnect(resumed=True)
    (again,) = harness.publishes()
    assert (again.dup, again.properties) == (True, {EXPIRY: [25]})
    harness.acknowledge(message)
    assert message.receipt.result(0) == "id"


def test_what_has_expired_is_not_sent_and_what_stands_behind_it_is(harness: Harness) -> None:
    harness.disconnect()
    late = harness.submit(b"late", properties={"message_expiry_interval": 5})
    harness.submit(b"in time", properties={"message_expiry_interval": 6})
    harness.clock.advance(5.0)
    harness.connect()
    assert harness.payloads() == [b"in time"]
    with pytest.raises(PublishRejectedError, match="message_expiry_interval was over"):
        late.receipt.result(0)
    assert harness.held()[0] == 1
    assert harness.counters.totals()["rejected"] == 1


def test_what_the_broker_may_have_is_said_again_though_it_has_expired(harness: Harness) -> None:
    """Or the handshake would never end; and QoS 2 promises an outcome."""
    message = harness.submit(qos=2, properties={"message_expiry_interval": 5})
    harness.pump()
    harness.clock.advance(60.0)
    harness.reconnect(resumed=True)
    (again,) = harness.publishes()
    assert (again.dup, again.properties) == (True, {EXPIRY: [1]})
    harness.acknowledge(message, kind=wire.PUBREC)
    harness.acknowledge(message, kind=wire.PUBCOMP)
    assert message.receipt.done()


@pytest.mark.parametrize("qos", [0, 1])
def test_mqtt_311_leaves_properties_out_and_says_so_now_and_then(
    qos: int, caplog: pytest.LogCaptureFixture
) -> None:
    harness = Harness()
    harness.connect(v5=False)
    for _ in range(3):
        harness.submit(b"x", qos, properties={"content_type": "text/plain"})
    harness.submit(b"x", qos)
    assert len(harness.publishes()) == 4
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "without their properties" in warning


def test_mqtt_311_keeps_to_an_expiry_interval_as_long_as_the_message_waits(harness: Harness) -> None:
    harness.disconnect()
    harness.submit(b"late", properties={"message_expiry_interval": 5})
    harness.clock.advance(5.0)
    harness.connect(v5=False)
    assert harness.payloads() == []
