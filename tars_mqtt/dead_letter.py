"""Dead letters: where a message goes that no attempt could handle."""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tars_mqtt._core.lane import Delivery
from tars_mqtt.context import log_fields
from tars_mqtt.errors import (
    ClosedError,
    DecodeError,
    NotConnectedError,
    OutboxError,
    QueueFullError,
    TopicError,
)
from tars_mqtt.message import Message, PublishReceipt
from tars_mqtt.topics import check_topic, matches

if TYPE_CHECKING:
    from tars_mqtt._core.backlog import Backlog
    from tars_mqtt._core.stats import Counters

logger = logging.getLogger("tars_mqtt.dispatch")

DEAD_LETTER_TYPE = "dead_letter"

_RETRY_DELAY = 1.0
"""Seconds until the next try when the disk of the outbox is full."""

_MOST_LOSSY = 1_000
"""Dead letters of messages of QoS 0 that wait for room, of one subscription; those of QoS 1 and 2 are bounded by what
the broker leaves unacknowledged."""


def dead_letter_topic(template: str, topic: str) -> str:
    """Return where the dead letter of a message on *topic* goes.

    Raises:
        TopicError: The template gives no topic.
    """
    if not isinstance(template, str):
        raise TopicError(f"dead_letter must be a topic such as 'dead/{{topic}}', not {template!r}")
    if set("{}") & set(template.replace("{topic}", "")):
        raise TopicError(f"dead_letter knows {{topic}} and no other braces (got {template!r})")
    try:
        return check_topic(template.replace("{topic}", topic))
    except TopicError as error:
        raise TopicError(f"dead_letter {template!r} gives no topic: {error}") from None


class DeadLetters:
    """The dead letters of one subscription. Any thread; waits for nothing but the disk of an outbox.

    Args:
        template: Their topic, in which ``{topic}`` stands for the message's.
        topic_filter: The subscription's.
        submit: `Engine.submit_event`, which queues them in *backlog*.
        later: Has a function called after so many seconds.
    """

    def __init__(
        self,
        template: str,
        topic_filter: str,
        submit: Callable[..., PublishReceipt],
        backlog: Backlog,
        later: Callable[[float, Callable[[], None]], None],
        counters: Counters,
        client_id: str,
    ) -> None:
        self._client_id = client_id
        self._template = template
        self._filter = topic_filter
        self._submit = submit
        self._backlog = backlog
        self._later = later
        self._counters = counters
        # Nobody else may hold them, and they must live to be told.
        self._under_way: set[PublishReceipt] = set()
        # Guarded by _lock:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Delivery, Callable[[], None]]] = deque()
        self._burying = False
        self._called = False
        self._tried = 0.0
        self._asked = False
        """Whether there is to be a call when there is room. Belongs to who buries, and to that call."""

    def bury(self, delivery: Delivery, over: Callable[[], None]) -> None:
        """Publish the dead letter with QoS 1; *over* is called when the broker has it.

        Where there is no room for it, it waits, in order. When the broker refuses it, the message is given up,
        counted and logged: no later attempt would come out differently.
        """
        with self._lock:
            before = len(self._waiting)
            too_many = not delivery.message.qos and before >= _MOST_LOSSY
            if not too_many:
                self._waiting.append((delivery, over))
        if too_many:
            self._give_up(delivery.message, QueueFullError("too many wait for room"), over)
        elif not before or time.monotonic() - self._tried > _RETRY_DELAY:
            # Otherwise somebody is at it, or they wait for room; which nobody tells any more after a shutdown.
            self._bury_waiting()

    def _bury_waiting(self) -> None:
        """Publish what waits until there is no room. Called again when there is."""
        with self._lock:
            self._called = True
            if self._burying:
                return
            self._burying = True
        try:
            while self._goes_on():
                self._bury_all()
        except BaseException:
            self._burying = False
            raise

    def _goes_on(self) -> bool:
        with self._lock:
            self._burying = again = self._called
            self._called = False
            return again

    def _bury_all(self) -> None:
        while self._waiting:
            self._tried = time.monotonic()
            delivery, over = self._waiting[0]
            try:
                self._publish(delivery, over)
            except QueueFullError as error:
                if error.retriable:
                    if self._asked:
                        return
                    self._asked = True  # and try once more: room may have come free in between
                    self._backlog.bounds(1).when_room(self._there_is_room)
                    continue
                self._give_up(delivery.message, error, over)
            except (OutboxError, NotConnectedError):  # the disk, or the client that left, may come back
                self._later(_RETRY_DELAY, self._bury_waiting)
                return
            except ClosedError:
                self._leave_unburied()
                return
            except Exception as error:  # it is too large, or anything else: those behind it shall not wait
                self._give_up(delivery.message, error, over)
            self._waiting.popleft()
        if self._asked:
            self._asked = False
            self._backlog.bounds(1).never_mind(self._there_is_room)

    def _there_is_room(self) -> None:
        """Called by who made the room: the network thread, or one that holds the disk."""
        self._asked = False
        self._later(0.0, self._bury_waiting)

    def _publish(self, delivery: Delivery, over: Callable[[], None]) -> None:
        message = delivery.message
        topic = dead_letter_topic(self._template, message.topic)
        if _is_dead_letter(message) and matches(self._filter, topic):
            raise TopicError("it is one itself, and its own would come to the same handler, without end")
        receipt = self._submit(
            topic, DEAD_LETTER_TYPE, self._data(delivery), _correlation_id(message), 1, False, 0.0
        )
        self._under_way.add(receipt)
        receipt._add_done_callback(lambda receipt: self._settled(receipt, message, over))

    def _leave_unburied(self) -> None:
        """The client leaves. Unacknowledged: the broker delivers the messages again, but for those of QoS 0."""
        with self._lock:
            waiting = tuple(self._waiting)
            self._waiting.clear()
        for delivery, _ in waiting:
            if not delivery.message.qos:
                self._counters.drop("dead_letter")

    def _settled(self, receipt: PublishReceipt, message: Message, over: Callable[[], None]) -> None:
        self._under_way.discard(receipt)
        error = receipt.exception(0)
        if error is None:
            self._counters.add("dead_letters")
            over()
        elif not isinstance(error, ClosedError):
            self._give_up(message, error, over)

    def _give_up(self, message: Message, error: BaseException, over: Callable[[], None]) -> None:
        self._counters.drop("dead_letter")
        logger.error(
            "gave up a message of %r: no dead letter: %s",
            message.topic,
            error,
            extra=log_fields(message, self._client_id),
        )
        over()

    def _data(self, delivery: Delivery) -> dict[str, Any]:
        message = delivery.message
        try:
            payload, encoding = message.payload.decode(), "utf-8"
        except UnicodeDecodeError:
            payload, encoding = base64.b64encode(message.payload).decode(), "base64"
        return {
            "topic": message.topic,
            "filter": self._filter,
            "qos": message.qos,
            "retain": message.retain,
            "payload": payload,
            "encoding": encoding,
            "error": delivery.error.encode(errors="replace").decode(),
            "attempts": delivery.failures,
            "failed_first": delivery.failed_first,
            "failed_last": time.time(),
        }


def _is_dead_letter(message: Message) -> bool:
    try:
        return message.envelope.type == DEAD_LETTER_TYPE
    except DecodeError:
        return False


def _correlation_id(message: Message) -> str | None:
    try:
        envelope = message.envelope
    except DecodeError:
        return None
    return envelope.correlation_id or envelope.id
