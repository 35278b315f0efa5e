"""Which message is being handled: for log lines that say so by themselves."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

from tars_mqtt.errors import DecodeError
from tars_mqtt.message import Message
from tars_mqtt.printable import printable

__all__ = ["EnvelopeLogFilter", "current_message"]

current_message: ContextVar[Message | None] = ContextVar("current_message", default=None)
"""The message whose handler is running, here or in what it called; None elsewhere."""


def log_fields(message: Message, client_id: str) -> dict[str, Any]:
    """The fields of a log record about *message*. What others wrote is printable."""
    fields: dict[str, Any] = {
        "client_id": client_id,
        "topic": printable(message.topic),
        "qos": message.qos,
    }
    try:
        envelope = message.envelope
    except DecodeError:
        return fields
    return fields | {
        "event_type": printable(envelope.type),
        "envelope_id": printable(envelope.id),
        "correlation_id": envelope.correlation_id and printable(envelope.correlation_id),
    }


class EnvelopeLogFilter(logging.Filter):
    """Adds ``topic``, ``envelope_id`` and ``correlation_id`` of the current message to log records.

    Fields that a record has already stay; outside a handler they are None. What others wrote is on
    one line and without escape sequences. The envelope is decoded only when a record passes by::

        handler.addFilter(EnvelopeLogFilter())
        handler.setFormatter(logging.Formatter("%(message)s [%(envelope_id)s]"))
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, with the fields added."""
        message = current_message.get()
        fields: dict[str, str | None] = {"topic": None, "envelope_id": None, "correlation_id": None}
        if message is not None:
            fields["topic"] = message.topic
            try:
                envelope = message.envelope
            except DecodeError:
                pass
            else:
                fields |= {"envelope_id": envelope.id, "correlation_id": envelope.correlation_id}
        for name, value in fields.items():
            if not hasattr(record, name):
                setattr(record, name, None if value is None else printable(value))
        return True
