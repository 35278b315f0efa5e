"""From topic to handler, for the clients that leave this to their user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paho.mqtt.matcher import MQTTMatcher


def dispatcher(filters: list[str], handle: Callable[[Any], None]) -> Callable[[str, Any], None]:
    """Return what calls *handle* for each of the filters that match a topic."""
    if len(filters) == 1:
        return lambda topic, envelope: handle(envelope)
    matcher = MQTTMatcher()  # type: ignore[no-untyped-call]
    for topic_filter in filters:
        matcher[topic_filter] = handle

    def dispatch(topic: str, envelope: Any) -> None:
        for matching in matcher.iter_match(topic):  # type: ignore[no-untyped-call]
            matching(envelope)

    return dispatch
