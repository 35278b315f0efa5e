"""Dead letters: where a message goes that no attempt could handle."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from tars_mqtt._core.lane import Delivery
from tars_mqtt.errors import (
    ClosedError,
    DecodeError,
    NotConnectedError,
    OutboxError,
    QueueFullError,
    TopicError,
)
from tars_mqtt.message import Message, PublishReceipt
from tars_mqtt.topics import check_topic

logger = logging.getLogger("tars_mqtt.dispatch")

DEAD_LETTER_TYPE = "dead_letter"

_AGAIN = 1.0
"""Seconds until the next try when the outgoing queue or the disk of the outbox is full."""


class Outlet(Protocol):
    """What dead letters need of an engine."""

    def submit_event(
        self,
        topic: str,
        event_type: str,
        data: Any,
        correlation_id: str | None,
        qos: int,
        retain: bool,
        timeout: float | None,
    ) -> PublishReceipt: ...

    def call_later(self, delay: float, call: Callable[[], None]) -> None: ...

    def count_dead_letter(self, dropped: bool) -> None: ...


def dead_letter_topic(template: str, topic: str) -> str:
    """Return where the dead letter of a message on *topic* goes.

    Raises:
        TopicError: The template gives no topic.
    """
    if not isinstance(template, str):
        raise TopicError(f"dead_letter must be a topic such as 'dead/{{topic}}', not {template!r}")
    return check_topic(template.replace("{topic}", topic))


class DeadLetters:
    """The dead letters of one subscription. Any thread; does not block."""

    def __init__(self, template: str, topic_filter: str, outlet: Outlet, client_id: str) -> None:
        self._client_id = client_id
        self._template = template
        self._filter = topic_filter
        self._outlet = outlet
        # Nobody else may hold them, and they must live to be told.
        self._under_way: set[PublishReceipt] = set()

    def bury(self, delivery: Delivery, over: Callable[[], None]) -> None:
        """Publish the dead letter with QoS 1; *over* is called when the broker has it.

        When the broker refuses it, the message is given up, counted and logged: no later attempt
        would come out differently.
        """
        message = delivery.message
        try:
            topic = dead_letter_topic(self._template, message.topic)
            receipt = self._outlet.submit_event(
                topic, DEAD_LETTER_TYPE, self._data(delivery), _correlation_id(message), 1, False, 0.0
            )
        except (QueueFullError, OutboxError) as error:
            if getattr(error, "retriable", True):
                self._outlet.call_later(_AGAIN, lambda: self.bury(delivery, over))
            else:
                self._give_up(message, error, over)
        except (ClosedError, NotConnectedError):
            # Unacknowledged: the broker delivers the message again to the next session.
            return
        except TopicError as error:
            self._give_up(message, error, over)
        else:
            self._under_way.add(receipt)
            receipt._add_done_callback(lambda receipt: self._settled(receipt, message, over))

    def _settled(self, receipt: PublishReceipt, message: Message, over: Callable[[], None]) -> None:
        self._under_way.discard(receipt)
        error = receipt.exception(0)
        if error is None:
            self._outlet.count_dead_letter(dropped=False)
            over()
        elif not isinstance(error, ClosedError):
            self._give_up(message, error, over)

    def _give_up(self, message: Message, error: BaseException, over: Callable[[], None]) -> None:
        self._outlet.count_dead_letter(dropped=True)
        logger.error(
            "gave up a message of %r: no dead letter: %s",
            message.topic,
            error,
            extra={"client_id": self._client_id, "topic": message.topic, "qos": message.qos},
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


def _correlation_id(message: Message) -> str | None:
    try:
        envelope = message.envelope
    except DecodeError:
        return None
    return envelope.correlation_id or envelope.id
