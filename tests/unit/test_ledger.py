"""Acknowledgements of incoming messages: after the work, in order of arrival, on the right connection."""

from __future__ import annotations

import threading

from tars_mqtt._core import wire
from tars_mqtt._core.ledger import Acknowledgement, Ledger
from tars_mqtt.message import Message


def message(qos: int = 1, payload: bytes = b"x", dup: bool = False, topic: str = "t") -> Message:
    return Message(topic, payload, qos, dup=dup)


def puback(packet_id: int) -> bytes:
    return wire.encode_ack(wire.PUBACK, packet_id)


def pubrec(packet_id: int) -> bytes:
    return wire.encode_ack(wire.PUBREC, packet_id)


def accepted(ledger: Ledger, packet_id: int, deliveries: int = 1, qos: int = 1) -> Acknowledgement:
    return ledger.accept(packet_id, message(qos), deliveries)


# -- one connection -----------------------------------------------------------------------


def test_nothing_is_acknowledged_before_its_handler_is_done() -> None:
    ledger = Ledger()
    acknowledgement = accepted(ledger, 7)
    assert ledger.take_due() == []
    assert acknowledgement.finish_one()
    assert ledger.take_due() == [puback(7)]
    assert ledger.take_due() == []
    assert len(ledger) == 0


def test_acknowledgements_leave_in_order_of_arrival() -> None:
    """[MQTT-4.6.0-2]: whichever handler is done first."""
    ledger = Ledger()
    first, second, third = (accepted(ledger, number) for number in (3, 1, 2))
    second.finish_one()
    third.finish_one()
    assert ledger.take_due() == []
    assert len(ledger) == 3
    first.finish_one()
    assert ledger.take_due() == [puback(3), puback(1), puback(2)]


def test_what_stands_behind_a_message_that_is_still_in_work_is_acknowledged_in_the_end() -> None:
    """In order. That message itself comes again, on the next connection."""
    ledger = Ledger()
    numbers = (3, 1, 2, 4)
    acknowledgements = [accepted(ledger, number) for number in numbers]
    for done in (1, 3):
        acknowledgements[done].finish_one()
    assert ledger.take_due() == []
    assert ledger.take_all_finished() == [puback(1), puback(4)]
    assert len(ledger) == 2
    acknowledgements[0].finish_one()
    ledger.new_connection(session_present=True)
    assert ledger.note_repetition(3, message(dup=True))
    assert ledger.take_due() == [puback(3)]


def test_a_message_is_done_with_the_last_of_its_handlers() -> None:
    ledger = Ledger()
    acknowledgement = accepted(ledger, 1, deliveries=3)
    assert [acknowledgement.finish_one() for _ in range(3)] == [False, False, True]
    assert ledger.take_due() == [puback(1)]


def test_a_message_for_nobody_is_acknowledged_in_its_turn() -> None:
    ledger = Ledger()
    first = accepted(ledger, 1)
    accepted(ledger, 2, deliveries=0)
    assert ledger.take_due() == []
    first.finish_one()
    assert ledger.take_due() == [puback(1), puback(2)]


def test_handlers_on_several_threads_are_all_counted() -> None:
    """Of many that finish at the same time exactly one is the last."""
    barrier = threading.Barrier(4)
    last: list[int] = []
    acknowledgements = [Acknowledgement(message(), 1, 4) for _ in range(300)]

    def finish() -> None:
        for number, acknowledgement in enumerate(acknowledgements):
            barrier.wait(10)
            if acknowledgement.finish_one():
                last.append(number)

    threads = [threading.Thread(target=finish, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert last == list(range(300))
    assert all(acknowledgement.finished for acknowledgement in acknowledgements)


def test_a_message_without_takers_may_find_some_later() -> None:
    acknowledgement = accepted(Ledger(), 1)
    acknowledgement.share(2)
    assert [acknowledgement.finish_one(), acknowledgement.finish_one()] == [False, True]


# -- the next connection ------------------------------------------------------------------


def test_nothing_is_acknowledged_on_a_newer_connection_than_its_own() -> None:
    ledger = Ledger()
    old = accepted(ledger, 1)
    ledger.new_connection(session_present=True)
    old.finish_one()
    assert ledger.take_due() == []
    new = accepted(ledger, 2)
    new.finish_one()
    assert ledger.take_due() == [puback(2)]


def test_a_redelivery_of_what_is_in_work_is_acknowledged_when_that_is_done() -> None:
    """It is not handled twice, and has its place in the order of the new connection."""
    ledger = Ledger()
    old = accepted(ledger, 1)
    ledger.new_connection(session_present=True)
    assert ledger.note_repetition(1, message(dup=True))
    later = accepted(ledger, 2)
    later.finish_one()
    assert ledger.take_due() == []
    old.finish_one()
    assert ledger.take_due() == [puback(1), puback(2)]


def test_a_redelivery_of_what_was_done_in_between_is_acknowledged_at_once() -> None:
    """The work was done during the outage."""
    ledger = Ledger()
    accepted(ledger, 1).finish_one()
    ledger.new_connection(session_present=True)
    assert ledger.note_repetition(1, message(dup=True))
    assert ledger.take_due() == [puback(1)]
    assert not ledger.note_repetition(1, message(dup=True)), "acknowledged: the next one is another message"


def test_a_redelivery_after_the_acknowledgement_was_sent_is_a_new_message() -> None:
    """The acknowledgement may have been lost on its way; at least once is what QoS 1 promises."""
    ledger = Ledger()
    accepted(ledger, 1).finish_one()
    ledger.take_due()
    ledger.new_connection(session_present=True)
    assert not ledger.note_repetition(1, message(dup=True))


def test_another_message_under_the_same_packet_id_is_handled() -> None:
    """A broker that lost its session counts from the beginning again, whatever it says."""
    different = [
        message(dup=False),
        message(dup=True, payload=b"y"),
        message(dup=True, topic="u"),
        message(qos=2, dup=True),
    ]
    for other in different:
        ledger = Ledger()
        old = accepted(ledger, 1)
        ledger.new_connection(session_present=True)
        assert not ledger.note_repetition(1, other)
        new = ledger.accept(1, other, 1)
        old.finish_one()
        assert ledger.take_due() == [], "the old one's end is not the new one's"
        new.finish_one()
        assert ledger.take_due() == [(pubrec if other.qos == 2 else puback)(1)]


def test_a_new_session_knows_nothing_of_the_old_one() -> None:
    ledger = Ledger()
    old = accepted(ledger, 1)
    ledger.new_connection(session_present=False)
    assert not ledger.note_repetition(1, message(dup=True))
    new = accepted(ledger, 1)
    old.finish_one()
    assert ledger.take_due() == []
    new.finish_one()
    assert ledger.take_due() == [puback(1)]


def test_what_will_not_be_handled_any_more_is_new_when_it_comes_again() -> None:
    """After a shutdown that gave messages up, the next connection must not wait for their handlers."""
    ledger = Ledger()
    accepted(ledger, 1)
    ledger.forget()
    ledger.new_connection(session_present=True)
    assert not ledger.note_repetition(1, message(dup=True))


# -- qos 2 --------------------------------------------------------------------------------


def test_qos_2_is_received_released_and_complete() -> None:
    ledger = Ledger()
    acknowledgement = accepted(ledger, 5, qos=2)
    assert not ledger.on_pubrel(5), "no PUBREC was sent"
    acknowledgement.finish_one()
    assert ledger.take_due() == [pubrec(5)]
    assert ledger.on_pubrel(5)
    assert not ledger.on_pubrel(5)
    assert not ledger.note_repetition(5, message(qos=2)), "the id is free again"


def test_qos_2_repeated_before_its_release_is_received_again_and_not_handled() -> None:
    """[MQTT-4.3.3-10]: our PUBREC was lost with the connection."""
    ledger = Ledger()
    accepted(ledger, 5, qos=2).finish_one()
    ledger.take_due()
    ledger.new_connection(session_present=True)
    assert ledger.note_repetition(5, message(qos=2, dup=True))
    assert ledger.take_due() == [pubrec(5)]
    assert ledger.on_pubrel(5)


def test_a_repeated_pubrec_waits_for_its_turn() -> None:
    ledger = Ledger()
    accepted(ledger, 5, qos=2).finish_one()
    ledger.take_due()
    first = accepted(ledger, 6)
    assert ledger.note_repetition(5, message(qos=2, dup=True))
    assert ledger.take_due() == []
    first.finish_one()
    assert ledger.take_due() == [puback(6), pubrec(5)]


def test_qos_2_released_on_the_next_connection_is_complete_there() -> None:
    ledger = Ledger()
    accepted(ledger, 5, qos=2).finish_one()
    ledger.take_due()
    ledger.new_connection(session_present=True)
    assert ledger.on_pubrel(5)


def test_what_was_received_is_remembered_when_unhandled_messages_are_forgotten() -> None:
    """Otherwise a message of QoS 2 would be handled twice."""
    ledger = Ledger()
    accepted(ledger, 5, qos=2).finish_one()
    ledger.take_due()
    ledger.forget()
    ledger.new_connection(session_present=True)
    assert ledger.note_repetition(5, message(qos=2, dup=True))


def test_a_new_session_forgets_what_was_received() -> None:
    ledger = Ledger()
    accepted(ledger, 5, qos=2).finish_one()
    ledger.take_due()
    ledger.new_connection(session_present=False)
    assert not ledger.on_pubrel(5)
    assert not ledger.note_repetition(5, message(qos=2, dup=True))


def test_a_packet_id_of_qos_2_between_receipt_and_release_is_no_obstacle_for_qos_1() -> None:
    ledger = Ledger()
    accepted(ledger, 5, qos=2).finish_one()
    ledger.take_due()
    assert not ledger.note_repetition(5, message(qos=1))
