"""What becomes of a dead letter that cannot leave at once."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tars_mqtt import (
    ClosedError,
    Message,
    NotConnectedError,
    OutboxError,
    PublishRejectedError,
    QueueFullError,
    dead_letter,
)
from tars_mqtt._core.lane import Delivery
from tars_mqtt.dead_letter import DeadLetters
from tars_mqtt.message import PublishReceipt

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeOutlet:
    """An engine, its backlog and its counters: refuses what it is told to, and then sends."""

    def __init__(self, *refusals: Exception) -> None:
        self._refusals = list(refusals)
        self.later: list[Callable[[], None]] = []
        self.on_room: list[Callable[[], None]] = []
        self.tries = 0
        self.sent: list[PublishReceipt] = []
        self.dropped: list[bool] = []

    def submit_event(self, topic: str, *_: Any) -> PublishReceipt:
        self.tries += 1
        if self._refusals:
            raise self._refusals.pop()
        self.sent.append(PublishReceipt("id", topic, 1))
        return self.sent[-1]

    def call_later(self, delay: float, call: Callable[[], None]) -> None:
        if delay:
            self.later.append(call)
        else:
            call()

    def when_room(self, callback: Callable[[], None]) -> None:
        self.on_room.append(callback)

    def never_mind(self, callback: Callable[[], None]) -> None:
        self.on_room.remove(callback)

    def bounds(self, qos: int) -> FakeOutlet:
        assert qos == 1
        return self

    def add(self, name: str) -> None:
        assert name == "dead_letters"
        self.dropped.append(False)

    def drop(self, reason: str) -> None:
        assert reason == "dead_letter"
        self.dropped.append(True)


def dead_letters(outlet: Any, template: str = "dead") -> DeadLetters:
    return DeadLetters(template, "a", outlet.submit_event, outlet, outlet.call_later, outlet, "me")


def bury(letters: DeadLetters, over: list[int], number: int = 1, qos: int = 0) -> None:
    letters.bury(Delivery(Message("a", b"%d" % number, qos), None), lambda: over.append(number))


def test_it_waits_for_room_and_the_message_with_it() -> None:
    outlet, over = FakeOutlet(QueueFullError("full"), QueueFullError("full")), []
    bury(dead_letters(outlet, "dead/{topic}"), over)
    assert (outlet.sent, over, outlet.later) == ([], [], [])
    outlet.on_room.pop()()
    outlet.sent[0]._settle()
    assert over == [1]
    assert outlet.dropped == [False]


def test_it_waits_for_a_disk_that_is_full_and_asks_now_and_then() -> None:
    """What cannot be stored makes no room: nobody would be called but by ourselves, at once and for ever."""
    outlet, over = FakeOutlet(*[OutboxError("the disk is full")] * 3), []
    letters = dead_letters(outlet, "dead/{topic}")
    for number in range(3):
        bury(letters, over, number)
    assert (outlet.tries, len(outlet.later), outlet.on_room) == (1, 1, [])
    outlet.later.pop()()
    assert (outlet.tries, len(outlet.later), outlet.on_room) == (2, 1, [])
    outlet.later.pop()()
    outlet.later.pop()()
    assert len(outlet.sent) == 3
    assert outlet.later == []


def test_one_that_the_broker_would_never_take_does_not_stop_those_behind_it() -> None:
    outlet, over = FakeOutlet(PublishRejectedError("too large", reason="packet too large")), []
    letters = dead_letters(outlet)
    for number in range(3):
        bury(letters, over, number, qos=1)
    assert over == [0]
    assert outlet.dropped == [True]
    assert len(outlet.sent) == 2


def test_those_that_a_shutdown_left_waiting_for_the_disk_are_tried_again_with_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dead_letter, "_RETRY_DELAY", 0.001)
    outlet, over = FakeOutlet(OutboxError("the disk is full")), []
    letters = dead_letters(outlet)
    bury(letters, over, 1)
    outlet.later.clear()  # the timer was stopped
    time.sleep(0.002)
    bury(letters, over, 2)
    assert len(outlet.sent) == 2


def test_room_that_comes_free_before_it_is_asked_for_is_not_missed() -> None:
    outlet, over = FakeOutlet(QueueFullError("full")), []
    bury(dead_letters(outlet), over)
    assert len(outlet.sent) == 1
    assert outlet.on_room == []


def test_those_behind_one_that_waits_are_not_tried_and_keep_their_order() -> None:
    """However many they are, and however long it takes."""
    outlet, over = FakeOutlet(*[QueueFullError("full")] * 4), []
    letters = dead_letters(outlet)
    for number in range(100):
        bury(letters, over, number)
    assert outlet.tries == 2
    assert len(outlet.on_room) == 1
    outlet.on_room.pop()()
    assert outlet.tries == 4
    outlet.on_room.pop()()
    assert len(outlet.sent) == 100
    for receipt in outlet.sent:
        receipt._settle()
    assert over == list(range(100))


def test_when_the_client_is_shut_down_those_that_wait_are_over_and_the_next_begin_anew() -> None:
    outlet, over = FakeOutlet(ClosedError("closed"), QueueFullError("full"), QueueFullError("full")), []
    letters = dead_letters(outlet)
    for number in range(10):
        bury(letters, over, number, qos=number % 2)
    outlet.on_room.pop()()
    assert outlet.sent == []
    assert over == [], "unacknowledged: the broker has them still"
    assert outlet.dropped == [True] * 5, "but for those of QoS 0"
    bury(letters, over, 11)
    assert len(outlet.sent) == 1


def test_those_of_a_client_that_has_left_the_broker_wait_until_it_is_back() -> None:
    """Given up, their messages would never be acknowledged: for the broker they are still in work."""
    outlet, over = FakeOutlet(NotConnectedError("offline")), []
    letters = dead_letters(outlet)
    bury(letters, over, 1, qos=1)
    assert outlet.sent == []
    outlet.later.pop()()
    outlet.sent[0]._settle()
    assert over == [1]


def test_dead_letters_of_qos_0_do_not_fill_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    outlet, over = FakeOutlet(QueueFullError("full"), QueueFullError("full")), []
    letters = dead_letters(outlet)
    for number in range(1_005):
        bury(letters, over, number)
    assert over == list(range(1_000, 1_005))
    assert outlet.dropped == [True] * 5
    bury(letters, over, 2_000, qos=1)
    outlet.on_room.pop()()
    assert len(outlet.sent) == 1_001


def test_one_that_no_room_is_large_enough_for_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that comes after the message would ever be acknowledged. The log says which client it was."""
    outlet, over = FakeOutlet(QueueFullError("too large", retriable=False)), []
    dead_letters(outlet, "dead/{topic}").bury(Delivery(Message("a", b""), None), lambda: over.append(1))
    assert over == [1]
    assert outlet.dropped == [True]
    assert outlet.later == []
    assert [record.client_id for record in caplog.records] == ["me"]  # type: ignore[attr-defined]


def test_many_threads_bury_at_once_and_nothing_is_left_lying() -> None:
    outlet, over = FakeOutlet(), []
    letters = dead_letters(outlet)

    def bury_many(first: int) -> None:
        for number in range(first, first + 200):
            bury(letters, over, number, qos=1)

    threads = [threading.Thread(target=bury_many, args=(index * 200,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outlet.sent) == 1_600
    assert not letters._waiting
