"""What a worker handles in one go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from time import monotonic
from typing import TYPE_CHECKING

from tars_mqtt._core.recovery import Outcome

if TYPE_CHECKING:
    from tars_mqtt._core.dispatch import Dispatcher, Turn
    from tars_mqtt._core.lane import Delivery
    from tars_mqtt.message import Message

in_work: ContextVar[tuple[Burst, int] | None] = ContextVar("in_work", default=None)
"""Inside a handler, and in what it has started: its worker's burst, and the number that this had."""


class Burst:
    """The deliveries that a worker, a thread or a task, handles in one go, and how they came out.

    Each worker has one, and begins it anew for every turn.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.turn: Turn | None = None
        """None while the worker has nothing to do."""
        self._batch: Sequence[Delivery] = ()
        self._index = 0
        self._handled = 0
        self._postponed = False
        self._started = 0.0
        self.number = 0

    def begin(self, turn: Turn) -> None:
        """Take what is to be handled. Holds the dispatcher's lock."""
        self.number += 1
        in_work.set((self, self.number))
        self.turn = turn
        self._index = 0
        self._batch = self.dispatcher._take(turn)
        self._handled = 0
        self._postponed = False
        self._started = monotonic()

    def in_work_as(self, number: int, message: Message | None) -> bool:
        """Whether the handler is still at *message*, in the burst that had this *number*."""
        return (
            self.number == number
            and self.turn is not None
            and self._index < len(self._batch)
            and self._batch[self._index].message is message
        )

    def __iter__(self) -> Iterator[Delivery]:
        """What is to be handled, one after the other; say how each `came_out`."""
        dispatcher, turn, batch = self.dispatcher, self.turn, self._batch
        assert turn is not None
        for self._index, delivery in enumerate(batch):
            if turn.life != dispatcher._life:
                # Not done, so not acknowledged: the broker delivers it to the next session.
                dispatcher._counters.drop("shutdown", len(batch) - self._index)
                return
            if turn.consumer.closed:
                dispatcher._give_up(batch[self._index :], "unsubscribed")
                return
            yield delivery
            if self._postponed:
                return

    def came_out(self, delivery: Delivery, outcome: Outcome) -> None:
        """Acknowledge, retry or bury."""
        dispatcher, turn = self.dispatcher, self.turn
        if outcome is Outcome.HANDLED or outcome is Outcome.SKIPPED:
            self._handled += outcome is Outcome.HANDLED
            acknowledgement = delivery.acknowledgement
            if acknowledgement is not None and acknowledgement.finish_one():
                dispatcher._acknowledge()
            return
        assert turn is not None
        delay = dispatcher._after_failure(turn.consumer, delivery, outcome)
        if delay is not None:
            self._postponed = True
            done, rest = self._batch[: self._index], self._batch[self._index :]
            dispatcher._postpone(turn, done, rest, self._handled, delay)

    def give_back(self, delay: float, from_outside: bool = False) -> None:
        """The worker ends in the middle: the delivery in work has failed, the rest is for another, after *delay*.

        Args:
            from_outside: Somebody else has cancelled the task, which says nothing of the message. Once, that is handled
                again without counting a failure; if the loop is about to end, it stays unacknowledged instead, and
                the broker delivers it again.
        """
        batch, index = self._batch, self._index
        if self.turn is None or not batch:
            return
        if from_outside and not batch[index].cut_off:
            batch[index].cut_off = True
            index -= 1
        else:
            self.came_out(batch[index], Outcome.FAILED)
        done, rest = batch[: index + 1], batch[index + 1 :]
        if rest and not self._postponed:
            self._postponed = True
            self.dispatcher._postpone(self.turn, done, rest, self._handled, delay)

    def finish(self) -> bool:
        """Account for it; True when the consumer has more for the same worker. Holds the dispatcher's lock."""
        turn, batch = self.turn, self._batch
        assert turn is not None
        self.turn, self._batch = None, ()
        duration = monotonic() - self._started
        return not self._postponed and self.dispatcher._finish(turn, batch, self._handled, duration)

    def forget(self) -> None:
        """Somebody else has dealt with it. An idle worker keeps no messages."""
        self.turn, self._batch = None, ()
