"""What waits on the way out: what is admitted, within which bounds, and what becomes of it in the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest

from tars_mqtt._core import crowd, wire
from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.event import LAST_PAHO_PACKET_ID
from tars_mqtt._core.outgoing import Outgoing, Stored
from tars_mqtt._core.spool import Spool
from tars_mqtt.errors import (
    ClosedError,
    NotConnectedError,
    OutboxError,
    PublishRejectedError,
    QueueFullError,
)
from tars_mqtt.outbox import Outbox
from tests.support import eventually
from tests.support.way_out import GRANTED, Harness, outgoing


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
    assert harness.outbound.acknowledged_count == harness.outbound.sent_count == 1


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
    harness.submit(b"x" * 60)
    harness.pump()
    with pytest.raises(PublishRejectedError):
        harness.submit(b"x" * 60, qos=0)
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
    outcomes: list[object], harness: Harness, timeout: float | None, qos: int = 1, payload: bytes = b"late"
) -> threading.Thread:
    def submit() -> None:
        try:
            outcomes.append(harness.submit(payload, qos=qos, timeout=timeout))
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=submit, daemon=True)
    before = harness.backlog.bounds(qos)._waiting
    thread.start()
    eventually(lambda: harness.backlog.bounds(qos)._waiting == before + 1)
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


def test_what_the_broker_would_never_take_does_not_wait_for_room() -> None:
    """Woken for room that it does not take, it would leave the next one waiting."""
    harness = Harness(max_queued=1)
    harness.connect(maximum_packet_size=20)
    harness.submit()
    with pytest.raises(PublishRejectedError, match="the broker takes 20"):
        harness.submit(b"x" * 50, qos=0)


def test_who_was_given_room_and_needs_none_leaves_it_to_the_next() -> None:
    """What is sent at once takes no place, and nobody would be told that one is free."""
    harness = Harness(max_queued=1)
    harness.connect()
    message = harness.submit()
    harness.pump()
    outcomes: list[object] = []
    lossy = in_thread(outcomes, harness, None, qos=0, payload=b"lossy")
    firm = in_thread(outcomes, harness, None, qos=1, payload=b"firm")
    stream = IdleStream()
    harness.idle_stream = stream
    harness.acknowledge(message)
    lossy.join(10)
    assert stream.sent == []
    harness.pump()
    firm.join(10)
    assert len(outcomes) == 2


def test_what_the_broker_does_not_take_any_more_leaves_its_room_to_the_next() -> None:
    harness = Harness(max_queued=1)
    harness.connect()
    message = harness.submit()
    harness.pump()
    outcomes: list[object] = []
    lossy = in_thread(outcomes, harness, None, qos=0, payload=b"x" * 50)
    firm = in_thread(outcomes, harness, None, qos=1)
    with harness.backlog._lock:
        harness.backlog._limits = attrs.evolve(GRANTED, maximum_packet_size=40)
    harness.acknowledge(message)
    lossy.join(10)
    firm.join(10)
    assert [type(outcome) for outcome in outcomes] == [PublishRejectedError, Outgoing]


def test_whoever_may_not_block_is_called_when_there_is_room() -> None:
    harness = Harness(max_queued=2)
    harness.connect()
    messages = [harness.submit(), harness.submit()]
    harness.pump()
    called: list[str] = []
    for name in "abc":
        harness.backlog.bounds(1).when_room(lambda name=name: called.append(name))
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
        harness.backlog.bounds(1).when_room(lambda number=number: called.append(number))
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
    harness.backlog.bounds(1).when_room(impatient)
    harness.backlog.bounds(1).when_room(patient)
    harness.backlog.bounds(1).never_mind(impatient)
    harness.acknowledge(message)
    assert called == ["patient"]


def test_who_gave_up_after_he_was_called_hands_the_call_on() -> None:
    harness = Harness(max_queued=1)
    harness.connect()
    message = harness.submit()
    harness.pump()
    called: list[str] = []
    impatient, patient = (lambda: called.append("impatient")), (lambda: called.append("patient"))
    harness.backlog.bounds(1).when_room(impatient)
    harness.backlog.bounds(1).when_room(patient)
    harness.acknowledge(message)
    assert called == ["impatient"]
    harness.backlog.bounds(1).never_mind(impatient)
    assert called == ["impatient", "patient"]


def test_a_large_one_that_waits_does_not_use_up_the_room_that_a_small_one_fits_into() -> None:
    """Not even where a place was all that the large one lacked when it came."""
    harness = Harness(max_queued=2, max_queued_bytes=1000)
    harness.connect()
    first = harness.submit(b"x" * 99)
    second = harness.submit(b"x" * 99)
    harness.pump()
    outcomes: list[object] = []
    large = in_thread(outcomes, harness, None, payload=b"x" * 799)
    small = in_thread(outcomes, harness, None, payload=b"small")
    with harness.backlog._lock:  # meanwhile a larger one takes the room: now the large one lacks bytes
        harness.backlog.bounds(1).held_bytes += 200
    harness.acknowledge(first)
    small.join(10)
    assert [outcome.payload for outcome in outcomes] == [b"small"]  # type: ignore[attr-defined]
    with harness.backlog._lock:
        harness.backlog.bounds(1).held_bytes -= 200
    harness.acknowledge(second)
    large.join(10)
    assert len(outcomes) == 2


def test_where_bytes_are_short_all_who_may_not_block_are_called() -> None:
    """The room of a large message is that of many small ones."""
    harness = Harness(max_queued_bytes=1000)
    harness.connect()
    message = harness.submit(b"x" * 990)
    harness.pump()
    called: list[int] = []
    for number in range(3):
        with pytest.raises(QueueFullError):
            harness.submit(b"x" * 99)
        harness.backlog.bounds(1).when_room(lambda number=number: called.append(number))
    assert called == []
    harness.acknowledge(message)
    assert called == [0, 1, 2]


def test_who_is_called_and_is_too_large_passes_the_call_on_to_all_others_and_once() -> None:
    harness = Harness(max_queued=2, max_queued_bytes=1000)
    harness.connect()
    messages = [harness.submit(b"x" * 399) for _ in range(2)]
    harness.pump()
    called: list[str] = []
    for name in "abc":
        with pytest.raises(QueueFullError):
            harness.submit(b"x" * 99)
        harness.backlog.bounds(1).when_room(lambda name=name: called.append(name))
    harness.acknowledge(messages[0])
    assert called == ["a"], "a place was all that they lacked"
    for _ in range(2):
        with pytest.raises(QueueFullError):
            harness.submit(b"x" * 700)
        harness.backlog.bounds(1).when_room(lambda: called.append("a"))
        harness.backlog.bounds(1).pass_on()
    assert called == ["a", "b", "c"]


def test_with_a_full_count_a_place_wakes_one_and_no_more() -> None:
    """However large they are, as long as their bytes would fit in."""
    harness = Harness(max_queued=1)
    harness.connect()
    message = harness.submit()
    harness.pump()
    notified: list[int] = []
    harness.backlog.bounds(1)._left.notify = notified.append  # type: ignore[method-assign, assignment]
    harness.backlog.bounds(1)._waiting = 5
    with pytest.raises(QueueFullError):
        harness.submit(b"x" * 1000)
    harness.acknowledge(message)
    assert notified == [1]


# -- with an outbox ---------------------------------------------------------------------------


def test_who_waits_for_memory_and_who_waits_for_the_disk_stand_in_lines_of_their_own(tmp_path: Path) -> None:
    """A place in the file is no use to a message of QoS 0, which would leave the next one waiting."""
    harness = Harness(max_queued=1)
    harness.connect()
    harness.backlog.attach(Spool(Outbox(tmp_path / "outbox.db"), lambda *_: None, 0.0), 1, 1000)
    stored = harness.submit()
    harness.submit(b"lossy", qos=0)
    outcomes: list[object] = []
    lossy = in_thread(outcomes, harness, None, qos=0)
    firm = in_thread(outcomes, harness, None, qos=1)
    called: list[int] = []
    for qos in (0, 1):
        harness.backlog.bounds(qos).when_room(partial(called.append, qos))
    assert harness.held() == (2, stored.size + len(harness.backlog.lossy[0]))
    harness.backlog.over(stored)
    firm.join(10)
    assert len(outcomes) == 1
    assert called == [1]
    harness.pump()
    lossy.join(10)
    assert len(outcomes) == 2
    assert called == [1, 0]
    harness.outbound.abandon()
    harness.backlog.close_outbox()


class SpoolOfTheLastMoment:
    """The client is shut down while it writes: it fails, or the message stays in the file."""

    on_disk_only = bytes_found = 0

    def __init__(self, backlog: Backlog, fails: bool) -> None:
        self._backlog = backlog
        self._fails = fails

    def store(self, message: Outgoing, stored: Callable[[Outgoing], None]) -> None:
        self._backlog.abandon(())
        if self._fails:
            raise OutboxError("it is closed")
        stored(message)

    def store_soon(
        self,
        message: Outgoing,
        stored: Callable[[Outgoing], None],
        failed: Callable[[Outgoing, OutboxError], None],
    ) -> None:
        self._backlog.abandon(())
        if self._fails:
            failed(message, OutboxError("it is closed"))
        else:
            stored(message)

    def flush(self) -> None: ...
    def retire(self) -> None: ...


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_a_message_that_is_admitted_when_the_client_is_shut_down_is_not_counted_in_the_next_life(
    waits: bool, fails: bool
) -> None:
    harness = Harness()
    harness.backlog.attach(SpoolOfTheLastMoment(harness.backlog, fails), 10, 1000)  # type: ignore[arg-type]
    message = outgoing()

    def publish() -> None:
        harness.backlog.admit(message, 0, wait_stored=waits)
        message.receipt.result(0)

    with pytest.raises(ClosedError, match="before the message was on disk" if fails else "in the outbox"):
        publish()
    assert harness.held() == (0, 0)


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_room_of_a_message_whose_publisher_is_interrupted_is_given_back_unless_it_is_on_disk(
    on_disk: bool,
) -> None:
    class InterruptedSpool(SpoolOfTheLastMoment):
        def store(self, message: Outgoing, stored: Callable[[Outgoing], None]) -> None:
            message.stored = Stored(1, 0.0) if on_disk else None
            raise KeyboardInterrupt

    harness = Harness()
    harness.backlog.attach(InterruptedSpool(harness.backlog, True), 10, 1000)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        harness.submit()
    assert harness.held() == ((1, 2) if on_disk else (0, 0))


def test_what_was_taken_back_does_not_stay_in_the_outbox(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    harness = Harness()
    harness.backlog.attach(Spool(Outbox(path), lambda *_: None, 0.0), 10, 1000)
    assert harness.submit(b"taken back").receipt.cancel()
    harness.submit(b"kept")
    assert harness.outbound.abandon() == 0
    harness.backlog.close_outbox()
    outbox = Outbox(path)
    assert [row.payload for row in outbox.fetch(0, 10)] == [b"kept"]
    outbox.close()


# -- large messages of QoS 0 --------------------------------------------------------------

LARGE = b"x" * 600_000


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Harness:
    """Where there is a crowd, a publisher waits until somebody ends it."""
    monkeypatch.setattr(crowd, "PACE_TIME", 60.0)
    harness = Harness(max_queued=10_000, max_queued_bytes=64 << 20)
    harness.connect()
    return harness


def submit_large_in_thread(harness: Harness) -> threading.Thread:
    thread = threading.Thread(target=harness.submit, args=(LARGE, 0, None), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "end", [Harness.pump, Harness.disconnect, lambda harness: harness.backlog.abandon(())]
)
def test_who_makes_large_messages_faster_than_they_leave_waits_a_moment(patient: Harness, end: Any) -> None:
    patient.submit(LARGE, 0, None)
    assert not patient.backlog.crowd.there
    thread = submit_large_in_thread(patient)
    eventually(lambda: len(patient.backlog.lossy) == 2, message="it is taken already")
    thread.join(0.05)
    assert thread.is_alive(), "it waits"
    end(patient)
    if patient.backlog.lossy:
        end(patient)
    thread.join(30)
    assert not thread.is_alive()
    assert not patient.backlog.crowd.there
    assert patient.held() == (0, 0)


def test_whoever_may_not_block_is_called_when_the_crowd_has_gone(patient: Harness) -> None:
    called: list[int] = []
    patient.backlog.crowd.when_gone(lambda: called.append(0))
    assert called == [0], "there was none"
    for _ in range(2):
        patient.submit(LARGE, 0, timeout=0)
    for number in (1, 2):
        patient.backlog.crowd.when_gone(lambda number=number: called.append(number))
    assert called == [0]
    patient.pump()
    patient.pump()
    assert called == [0, 1, 2]
    for _ in range(2):
        patient.submit(LARGE, 0, timeout=0)
    patient.backlog.crowd.when_gone(lambda: called.append(3))
    patient.disconnect()
    assert called == [0, 1, 2, 3]


def test_whoever_has_waited_long_enough_for_the_crowd_to_go_is_not_called(patient: Harness) -> None:
    called: list[int] = []
    callbacks = [lambda number=number: called.append(number) for number in (1, 2)]
    for _ in range(2):
        patient.submit(LARGE, 0, timeout=0)
    for callback in callbacks:
        patient.backlog.crowd.when_gone(callback)
    patient.backlog.crowd.never_mind(callbacks[0])
    patient.disconnect()
    assert called == [2]
    patient.backlog.crowd.never_mind(callbacks[1])  # too late, and no error


def test_small_messages_do_not_wait_for_large_ones(patient: Harness) -> None:
    for _ in range(2):
        patient.submit(LARGE, 0, timeout=0)
    assert patient.backlog.crowd.there
    patient.submit(b"small", 0, None)  # returns
    assert not patient.backlog.joins_a_crowd()


def test_whoever_may_not_block_does_not_wait_behind_a_crowd(patient: Harness) -> None:
    for _ in range(10):
        patient.submit(LARGE, 0, timeout=0)
    assert patient.backlog.crowd.there
    assert len(patient.backlog.lossy) == 10


def test_small_messages_are_no_crowd(patient: Harness) -> None:
    for _ in range(5_000):
        patient.submit(b"x" * 1_000, 0, None)
    assert not patient.backlog.crowd.there


def test_the_wait_behind_a_crowd_is_short() -> None:
    harness = Harness(max_queued_bytes=64 << 20)
    harness.connect()
    for _ in range(5):
        harness.submit(LARGE, 0, None)  # returns, although nobody takes them
    assert len(harness.backlog.lossy) == 5


# -- QoS 0 past the network thread --------------------------------------------------------


class IdleStream:
    """A connection whose network thread sleeps."""

    def __init__(self, takes: bool = True, leaves: int = 0) -> None:
        self.sent: list[bytes] = []
        self.outgoing_bytes = 0
        self._takes = takes
        self._leaves = leaves

    def send_now(self, packet: bytes) -> bool:
        if self._takes:
            self.sent.append(packet)
            self.outgoing_bytes = self._leaves
        return self._takes


def test_qos_0_goes_at_once_while_the_network_thread_sleeps(harness: Harness) -> None:
    harness.idle_stream = IdleStream()
    harness.submit(b"now", qos=0)
    assert harness.idle_stream.sent == [wire.encode_publish(b"t", b"now", 0, False, False, 0, True)]
    assert harness.wakes == 0
    assert harness.held() == (0, 0)
    assert harness.backlog.sent_at_once == 1
    assert harness.payloads() == []


def test_it_overtakes_nothing_that_is_queued(harness: Harness) -> None:
    harness.submit(b"first", qos=0)
    harness.idle_stream = IdleStream()
    harness.submit(b"second", qos=0)
    assert harness.idle_stream.sent == []
    assert harness.payloads() == [b"first", b"second"]
    harness.submit(b"third", qos=0)
    assert len(harness.idle_stream.sent) == 1


def test_what_cannot_go_at_once_is_queued(harness: Harness) -> None:
    harness.idle_stream = IdleStream(takes=False)
    harness.submit(b"later", qos=0)
    assert harness.wakes == 1
    assert harness.payloads() == [b"later"]
    assert harness.backlog.sent_at_once == 0


def test_large_messages_are_left_to_the_network_thread(harness: Harness) -> None:
    harness.idle_stream = IdleStream()
    harness.submit(b"x" * 50_000, qos=0)
    assert harness.idle_stream.sent == []
    assert len(harness.payloads()) == 1


def test_the_network_thread_is_woken_for_what_the_socket_has_left(harness: Harness) -> None:
    harness.idle_stream = IdleStream(leaves=5)
    harness.submit(b"now", qos=0)
    assert harness.wakes == 1
    assert harness.payloads() == []


def test_a_connection_that_ends_in_between_refuses_as_if_it_had_ended_before(harness: Harness) -> None:
    class Ending(IdleStream):
        def send_now(self, packet: bytes) -> bool:
            harness.disconnect()
            return False

    harness.idle_stream = Ending()
    with pytest.raises(NotConnectedError):
        harness.submit(b"late", qos=0)
    assert harness.held() == (0, 0)


def test_what_the_broker_would_not_take_is_not_sent_at_once_either() -> None:
    harness = Harness()
    harness.connect(maximum_packet_size=100)
    harness.idle_stream = IdleStream()
    with pytest.raises(PublishRejectedError):
        harness.submit(b"x" * 200, qos=0)
    assert harness.idle_stream.sent == []


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
    eventually(lambda: harness.backlog._flushing)
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
