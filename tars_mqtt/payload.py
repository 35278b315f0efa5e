"""The events that a client publishes about itself: where they go, and their data."""

from __future__ import annotations

import time
from typing import Any, Final

import attrs

HEALTH_TYPE: Final = "health.status"
HEARTBEAT_TYPE: Final = "health.heartbeat"


def health_topic(source_name: str) -> str:
    return f"system/health/{source_name}"


def heartbeat_topic(source_name: str) -> str:
    return f"system/keepalive/{source_name}"


@attrs.frozen
class HealthPayload:
    """How a service is: the data of ``health.status``.

    Attributes:
        ok: Whether it works.
        event: What happened: ``ready``, ``reconnected``, ``disconnected``, ``shutdown``, ``connection_lost``
            (the last will), ``handler_timeout``, ``handler_returned``, or the service's own word.
        error: What is wrong.
        timestamp: Unix time in seconds.
    """

    ok: bool
    event: str | None = None
    error: str | None = None
    timestamp: float = attrs.field(factory=time.time)

    def to_data(self) -> dict[str, Any]:
        """As JSON data; keys that say nothing are left out."""
        return attrs.asdict(self, filter=lambda _, value: value is not None)

    def at(self, timestamp: float) -> HealthPayload:
        """The same at another time."""
        return attrs.evolve(self, timestamp=timestamp)


@attrs.frozen
class HeartbeatPayload:
    """A sign of life: the data of ``health.heartbeat``.

    Attributes:
        ok: Always true.
        event: Always ``heartbeat``.
        timestamp: Unix time in seconds.
    """

    ok: bool = True
    event: str = "heartbeat"
    timestamp: float = attrs.field(factory=time.time)

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        return attrs.asdict(self)
