"""What becomes of a dead letter that cannot leave at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tars_mqtt import Message, OutboxError, QueueFullError
from tars_mqtt._core.lane import Delivery
from tars_mqtt.dead_letter import DeadLetters
from tars_mqtt.message import PublishReceipt

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeOutlet:
    """Refuses what it is told to, and then sends."""

    def __init__(self, *refusals: Exception) -> None:
        self._refusals = list(refusals)
        self.later: list[Callable[[], None]] = []
        self.sent: list[PublishReceipt] = []
        self.dropped: list[bool] = []

    def submit_event(self, topic: str, *_: Any) -> PublishReceipt:
        if self._refusals:
            raise self._refusals.pop()
        self.sent.append(PublishReceipt("id", topic, 1))
        return self.sent[-1]

    def call_later(self, _: float, call: Callable[[], None]) -> None:
        self.later.append(call)

    def count_dead_letter(self, dropped: bool) -> None:
        self.dropped.append(dropped)


@pytest.mark.parametrize("refusal", [QueueFullError("full"), OutboxError("the disk is full")])
def test_it_waits_for_room_and_the_message_with_it(refusal: Exception) -> None:
    outlet, over = FakeOutlet(refusal), []
    DeadLetters("dead/{topic}", "a", outlet, "me").bury(
        Delivery(Message("a", b""), None), lambda: over.append(1)
    )
    assert (outlet.sent, over) == ([], [])
    outlet.later.pop()()
    outlet.sent[0]._settle()
    assert over == [1]
    assert outlet.dropped == [False]


def test_one_that_no_room_is_large_enough_for_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that comes after the message would ever be acknowledged. The log says which client it was."""
    outlet, over = FakeOutlet(QueueFullError("too large", retriable=False)), []
    DeadLetters("dead/{topic}", "a", outlet, "me").bury(
        Delivery(Message("a", b""), None), lambda: over.append(1)
    )
    assert over == [1]
    assert outlet.dropped == [True]
    assert outlet.later == []
    assert [record.client_id for record in caplog.records] == ["me"]  # type: ignore[attr-defined]
