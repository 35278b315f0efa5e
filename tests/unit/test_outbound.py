"""The way out: what is admitted, in what order it leaves, and what becomes of it."""

from __future__ import annotations

import logging
import math
import threading
from concurrent.futures import CancelledError

import attrs
import pytest

from tars_mqtt._core import wire
from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.outbound import _ENOUGH_UNSENT, Outbound
from tars_mqtt._core.outgoing import Outgoing
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.transport import LAST_PAHO_PACKET_ID, Connack
from tars_mqtt.errors import ClosedError, NotConnectedError, PublishRejectedError, QueueFullError
from tars_mqtt.message import PublishReceipt
from tests.support import PacketType, eventually
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
        self.backlog = Backlog(max_queued, max_queued_bytes, self.wake)
        self.outbound = Outbound(self.backlog, max_inflight, self.counters, clock=self.clock)
        self.v5 = True
        self.more = False

    def wake(self) -> None:
        self.wakes += 1

    def connect(self, v5: bool = True, resumed: bool = False, **limits) -> None:
        self.v5 = v5
        self.outbound.connected(attrs.evolve(GRANTED, **limits), v5, resumed)

    def disconnect(self, by_broker: bool = True) -> None:
        self.outbound.disconnected(by_broker)

    def reconnect(self, resumed: bool, by_broker: bool = False, **limits) -> None:
        self.disconnect(by_broker)
        self.connect(self.v5, resumed, **limits)

    def submit(self, payload: bytes = b"x", qos: int = 1, timeout: float | None = 0, **options) -> Outgoing:
        message = outgoing(payload, qos, **options)
        self.backlog.admit(message, timeout)
        return message

    def pump(self, unsent_bytes: int = 0) -> list[mqtt.Packet]:
        written: list[bytes] = []
        self.more = self.outbound.pump(written.append, unsent_bytes)
        suspicion = self.outbound.suspicion
        while suspicion.wants_answer or suspicion.look_again_at < math.inf:
            assert written == []
            if suspicion.wants_answer:
                suspicion.answered()
            else:
                self.clock.advance(1.0)
            self.more = self.outbound.pump(written.append, unsent_bytes)
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
    make = PublishReceipt if qos else PublishReceipt._settled
    return Outgoing(topic, payload, qos, retain, make("id", topic.decode(), qos))


@pytest.fixture
def harness() -> Harness:
    harness = Harness()
    harness.connect()
    return harness


# -- admission ----------------------------------------------------------------------------


def test_what_is_admitted_is_written_and_the_network_thread_is_woken(harness: Harness) -> None:
    message = harness.submit(b"hello", qos=1, retain=True)
    assert harness.wakes == 1
    (publish,) = harness.publishes()
    assert publish == ("t", b"hello", 1, True, False, message.packet_id, {})
    assert not message.receipt.done()
    harness.acknowledge(message)
    assert message.receipt.result(0) == "id"
    assert harness.outbound.acknowledgements == harness.outbound.messages == 1


def test_packet_ids_are_above_those_of_paho(harness: Harness) -> None:
    message = harness.submit()
    harness.pump()
    assert message.packet_id > LAST_PAHO_PACKET_ID


def test_qos_1_and_2_wait_for_a_connection_in_order() -> None:
    harness = Harness()
    for number in range(3):
        harness.submit(b"%d" % number, qos=1 + number % 2)
    assert harness.payloads() == [], "there is no connection to write to"
    harness.connect()
    assert harness.payloads() == [b"0", b"1", b"2"]


def test_qos_0_without_a_connection_is_refused_and_not_kept(harness: Harness) -> None:
    harness.disconnect()
    with pytest.raises(NotConnectedError, match="publish with qos=1 to have it wait"):
        harness.submit(qos=0)
    assert harness.held() == (0, 0)


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_nothing_is_admitted_after_a_refusal_until_it_is_open_again(harness: Harness, qos: int) -> None:
    """Not even while the connection still stands: nobody would tell what became of it."""
    refusal = ClosedError("the client was shut down")
    harness.backlog.refuse(refusal)
    raised = []
    for _ in range(2):
        with pytest.raises(ClosedError, match="shut down") as caught:
            harness.submit(qos=qos)
        raised.append(caught.value)
    assert raised[0] is not raised[1], "each caller has an error of its own"
    assert refusal not in raised
    assert harness.held() == (0, 0)
    harness.backlog.open()
    harness.submit(qos=qos)


# -- bounds -------------------------------------------------------------------------------


def test_the_count_is_bounded_unacknowledged_messages_included() -> None:
    harness = Harness(max_queued=2)
    harness.connect()
    first = harness.submit()
    harness.submit()
    harness.pump()
    with pytest.raises(QueueFullError, match="2 outgoing messages with 4 bytes are held already"):
        harness.submit()
    harness.acknowledge(first)
    harness.submit()
    assert harness.held() == (2, 4)


def test_the_bytes_are_bounded_topic_included() -> None:
    harness = Harness(max_queued_bytes=100)
    harness.submit(b"x" * 49, topic=b"a")
    harness.submit(b"x" * 49, topic=b"b")
    with pytest.raises(QueueFullError):
        harness.submit(b"", topic=b"c")


def test_a_message_larger_than_all_the_room_is_refused_at_once() -> None:
    """Waiting would never help."""
    harness = Harness(max_queued_bytes=100)
    with pytest.raises(QueueFullError, match="raise max_queued_bytes"):
        harness.submit(b"x" * 100, timeout=None)


def test_room_comes_free_however_a_message_ends() -> None:
    harness = Harness(max_queued=1, max_queued_bytes=100)
    harness.connect(maximum_packet_size=50)
    acknowledged = harness.submit()
    harness.pump()
    harness.acknowledge(acknowledged)
    refused = harness.submit()
    harness.pump()
    harness.acknowledge(refused, 0x87)
    completed = harness.submit(qos=2)
    harness.pump()
    harness.acknowledge(completed, kind=wire.PUBREC)
    harness.acknowledge(completed, kind=wire.PUBCOMP)
    not_taken = harness.submit(qos=2)
    harness.pump()
    harness.acknowledge(not_taken, 0x97, wire.PUBREC)
    cancelled = harness.submit()
    cancelled.receipt.cancel()
    harness.pump()
    harness.submit(qos=0)
    harness.pump()
    for qos in (0, 1):
        harness.submit(b"x" * 60, qos=qos)
        harness.pump()
    harness.submit(qos=0)
    harness.disconnect()
    harness.submit()
    harness.outbound.abandon()
    assert harness.held() == (0, 0)
    assert (harness.held(), harness.outbound.inflight) == ((0, 0), 0)


def test_health_goes_first_and_needs_no_room() -> None:
    harness = Harness(max_queued=1)
    harness.submit(b"full")
    harness.backlog.admit_first(outgoing(b"health"))
    assert harness.held() == (2, 12)
    harness.connect()
    assert harness.payloads() == [b"health", b"full"]


# -- waiting for room ---------------------------------------------------------------------


def in_thread(
    outcomes: list[object], harness: Harness, timeout: float | None, qos: int = 1
) -> threading.Thread:
    def submit() -> None:
        try:
            outcomes.append(harness.submit(b"late", qos=qos, timeout=timeout))
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=submit, daemon=True)
    before = harness.backlog._waiting
    thread.start()
    eventually(lambda: harness.backlog._waiting == before + 1)
    return thread


def test_a_caller_waits_for_room_and_gets_it() -> None:
    harness = Harness(max_queued=1)
    harness.connect()
    first = harness.submit()
    harness.pump()
    outcomes: list[object] = []
    thread = in_thread(outcomes, harness, None)
    assert outcomes == []
    harness.acknowledge(first)
    thread.join(10)
    assert [type(outcome) for outcome in outcomes] == [Outgoing]
    assert harness.payloads() == [b"late"]


def test_all_who_wait_get_room_in_time() -> None:
    """Whatever order they wake in, nobody is forgotten."""
    harness = Harness(max_queued=1)
    harness.connect()
    message = harness.submit()
    harness.pump()
    outcomes: list[object] = []
    threads = [in_thread(outcomes, harness, None) for _ in range(5)]
    for done in range(1, 6):
        harness.acknowledge(message)
        eventually(lambda done=done: len(outcomes) == done)
        message = outcomes[-1]  # type: ignore[assignment]
        harness.pump()
    for thread in threads:
        thread.join(10)
    assert [type(outcome) for outcome in outcomes] == [Outgoing] * 5


def test_a_wait_for_room_ends_with_its_time() -> None:
    harness = Harness(max_queued=1)
    harness.submit()
    with pytest.raises(QueueFullError):
        harness.submit(timeout=0.001)
    assert harness.held() == (1, 2)


@pytest.mark.parametrize("qos", [0, 1])
def test_a_shutdown_ends_the_wait_for_room(qos: int) -> None:
    harness = Harness(max_queued=1)
    harness.connect()
    harness.submit()
    outcomes: list[object] = []
    thread = in_thread(outcomes, harness, None, qos)
    harness.backlog.refuse(ClosedError("shut down"))
    thread.join(10)
    assert [type(outcome) for outcome in outcomes] == [ClosedError]


def test_a_lost_connection_ends_the_wait_of_qos_0_and_not_that_of_qos_1() -> None:
    harness = Harness(max_queued=1)
    harness.connect()
    message = harness.submit()
    harness.pump()
    outcomes: list[object] = []
    lossy = in_thread(outcomes, harness, None, qos=0)
    firm = in_thread(outcomes, harness, None, qos=1)
    harness.disconnect()
    lossy.join(10)
    assert [type(outcome) for outcome in outcomes] == [NotConnectedError]
    harness.connect(resumed=True)
    harness.pump()
    harness.acknowledge(message)
    firm.join(10)
    assert type(outcomes[-1]) is Outgoing


def test_whoever_may_not_block_is_called_when_there_is_room() -> None:
    harness = Harness(max_queued=2)
    harness.connect()
    messages = [harness.submit(), harness.submit()]
    harness.pump()
    called: list[str] = []
    for name in "abc":
        harness.backlog.when_room(lambda name=name: called.append(name))
    harness.acknowledge(messages[0])
    assert called == ["a"], "one for each message that left"
    harness.acknowledge(messages[1])
    assert called == ["a", "b"]
    harness.backlog.refuse(ClosedError("shut down"))
    assert called == ["a", "b", "c"]
    harness.backlog.refuse(ClosedError("shut down"))
    assert called == ["a", "b", "c"]


def test_a_lost_connection_calls_all_who_wait_for_room() -> None:
    """Those with QoS 0 have to be told."""
    harness = Harness()
    harness.connect()
    called: list[int] = []
    for number in range(3):
        harness.backlog.when_room(lambda number=number: called.append(number))
    harness.disconnect()
    assert called == [0, 1, 2]


def test_who_no_longer_wants_room_leaves_his_turn_to_the_next() -> None:
    """One that gave up must not use up the call that another one waits for."""
    harness = Harness(max_queued=1)
    harness.connect()
    message = harness.submit()
    harness.pump()
    called: list[str] = []
    impatient, patient = (lambda: called.append("impatient")), (lambda: called.append("patient"))
    harness.backlog.when_room(impatient)
    harness.backlog.when_room(patient)
    harness.backlog.never_mind(impatient)
    harness.acknowledge(message)
    assert called == ["patient"]


def test_who_gave_up_after_he_was_called_hands_the_call_on() -> None:
    harness = Harness(max_queued=1)
    harness.connect()
    message = harness.submit()
    harness.pump()
    called: list[str] = []
    impatient, patient = (lambda: called.append("impatient")), (lambda: called.append("patient"))
    harness.backlog.when_room(impatient)
    harness.backlog.when_room(patient)
    harness.acknowledge(message)
    assert called == ["impatient"]
    harness.backlog.never_mind(impatient)
    assert called == ["impatient", "patient"]


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


def test_a_repeated_acknowledgement_is_no_second_one(harness: Harness) -> None:
    message = harness.submit()
    harness.pump()
    harness.acknowledge(message)
    harness.acknowledge(message)
    assert harness.outbound.acknowledgements == 1
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
    assert harness.outbound.acknowledgements == 0


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


# -- what can never be sent ---------------------------------------------------------------


def test_a_packet_larger_than_the_broker_takes_is_rejected_and_not_sent() -> None:
    """[MQTT-3.2.2-15]: sending it would cost the connection, again and again."""
    harness = Harness()
    harness.connect(maximum_packet_size=20)
    fits = b"x" * (20 - 2 - 3 - 2 - 1)
    too_large = [harness.submit(fits + b"x"), harness.submit(fits + b"xxx", qos=0)]
    harness.submit(fits)
    (publish,) = harness.publishes()
    assert publish.payload == fits
    with pytest.raises(PublishRejectedError, match="21 bytes, the broker takes 20") as caught:
        too_large[0].receipt.result(0)
    assert caught.value.code is None
    assert harness.counters.totals()["rejected"] == 2


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


# -- shutdown -----------------------------------------------------------------------------


def test_flushed_means_that_the_broker_has_everything(harness: Harness) -> None:
    assert harness.backlog.wait_flushed(0)
    message = harness.submit()
    assert not harness.backlog.wait_flushed(0)
    harness.pump()
    assert not harness.backlog.wait_flushed(0)
    outcomes: list[bool] = []
    waiter = threading.Thread(target=lambda: outcomes.append(harness.backlog.wait_flushed(10)), daemon=True)
    waiter.start()
    eventually(lambda: harness.backlog._waiting)
    harness.acknowledge(message)
    waiter.join(10)
    assert outcomes == [True]


def test_what_is_abandoned_fails_and_is_counted(harness: Harness) -> None:
    sent = harness.submit()
    harness.pump()
    queued = harness.submit()
    harness.submit(qos=0)
    harness.backlog.refuse(ClosedError("shut down"))
    assert harness.outbound.abandon() == 2
    for message in (sent, queued):
        with pytest.raises(ClosedError, match="before the broker acknowledged"):
            message.receipt.result(0)
    assert harness.counters.dropped() == {"shutdown": 3}
    harness.connect()
    assert harness.pump() == []


def test_what_was_taken_back_is_not_lost_with_a_shutdown() -> None:
    harness = Harness()
    harness.submit().receipt.cancel()
    assert harness.outbound.abandon() == 0
    assert harness.counters.dropped() == {}


# -- many threads -------------------------------------------------------------------------


def test_many_publishers_and_a_broken_connection_lose_and_swap_nothing() -> None:
    """Each thread's messages leave in its order, with bounds small enough to be met all the time."""
    harness = Harness(max_inflight=3, max_queued=5)
    threads = [
        threading.Thread(
            target=lambda name=name: [harness.submit(b"%d %d" % (name, n), timeout=None) for n in range(60)],
            daemon=True,
        )
        for name in range(3)
    ]
    for thread in threads:
        thread.start()
    harness.connect()
    arrived: list[tuple[int, ...]] = []

    def network() -> bool:
        for number, publish in enumerate(harness.publishes()):
            name = tuple(map(int, publish.payload.split()))
            if name not in arrived:
                arrived.append(name)
            if number % 3 == 2:
                harness.reconnect(resumed=True)
                break
            harness.outbound.acknowledged(wire.PUBACK, publish.packet_id, 0)
        return len(arrived) == 180 and not harness.held()[0]

    eventually(network, 30, interval=0)
    for thread in threads:
        thread.join(10)
    for name in range(3):
        assert [n for thread, n in arrived if thread == name] == list(range(60))
