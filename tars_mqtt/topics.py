"""Topics and filters: what the standard allows, and which filter matches which topic [MQTT-4.7, MQTT-4.8.2].

A *topic* is published to, a *filter* is subscribed with. Nothing is normalised: ``a`` and ``/a`` differ.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from tars_mqtt.errors import TopicError

__all__ = ["check_filter", "check_topic", "is_shared", "matches", "split_share", "topic_bytes"]

MAX_STRING_BYTES: Final = 65_535
"""Of a string on the wire, by its length field of two bytes [MQTT-1.5.3]."""

_SHARE: Final = "$share/"


def check_topic(topic: object) -> str:
    """Return *topic* as a plain ``str``, or say what is wrong with it.

    Raises:
        TopicError: Not a str, empty, too long, not UTF-8, or with a wildcard or a NUL inside.
    """
    text = topic if type(topic) is str else _plain_str(topic, "topic")
    _encode_topic(text)
    return text


def topic_bytes(topic: object) -> bytes:
    """Return *topic* checked and encoded, as it goes on the wire.

    Raises:
        TopicError: As for `check_topic`.
    """
    return _encode_topic(topic if type(topic) is str else _plain_str(topic, "topic"))


def check_filter(topic_filter: object) -> str:
    """Return *topic_filter* as a plain ``str``, or say what is wrong with it.

    Raises:
        TopicError: Not a str, empty, too long, not UTF-8, a NUL inside, a wildcard out of place, or a
            ``$share/`` without its group or its filter.
    """
    if isinstance(topic_filter, (list, tuple)):
        raise TopicError(
            f"a filter must be a str, not {type(topic_filter).__name__}: subscribe to one at a time"
        )
    text = _plain_str(topic_filter, "filter")
    _encode(text, "filter")
    group, plain = split_share(text)
    if group is not None:
        _check_share(text, group, plain)
    levels = plain.split("/")
    if "#" in levels[:-1]:
        raise TopicError(f"filter {_shown(text)} has levels after '#': it must be the last, as in 'a/#'")
    for level in levels:
        if len(level) > 1 and ("+" in level or "#" in level):
            raise TopicError(
                f"filter {_shown(text)} has a wildcard in the level {_shown(level)}: "
                f"a wildcard must be a whole level, as in 'a/+/b' or 'a/#'"
            )
    return text


def split_share(topic_filter: str) -> tuple[str | None, str]:
    """Split off the group of a shared filter (None if it is not shared); the rest is what topics match."""
    if not topic_filter.startswith(_SHARE):
        return None, topic_filter
    group, _, plain = topic_filter[len(_SHARE) :].partition("/")
    return group, plain


def is_shared(topic_filter: str) -> bool:
    """Whether the messages are shared among the subscribers of a group [MQTT-4.8.2]."""
    return split_share(topic_filter)[0] is not None


def matches(topic_filter: str, topic: str) -> bool:
    """Tell whether a message on *topic* is for *topic_filter*; both have passed their checks."""
    _, plain = split_share(topic_filter)
    if topic.startswith("$") and plain.startswith(("+", "#")):
        return False  # [MQTT-4.7.2-1]
    filter_levels = plain.split("/")
    topic_levels = topic.split("/")
    for index, level in enumerate(filter_levels):
        if level == "#":  # also for the level above: "a/#" matches "a"
            return True
        if index == len(topic_levels) or level not in ("+", topic_levels[index]):
            return False
    return len(filter_levels) == len(topic_levels)


# A service publishes to few topics, again and again. Only what passed is kept: an exception is not cached.
@lru_cache(maxsize=1024)
def _encode_topic(topic: str) -> bytes:
    encoded = _encode(topic, "topic")
    for wildcard in "+#":
        if wildcard in topic:  # [MQTT-3.3.2-2]
            raise TopicError(
                f"topic {_shown(topic)} contains the wildcard {wildcard!r}: "
                f"wildcards are for subscribing, a message goes to one topic"
            )
    return encoded


def _encode(text: str, noun: str) -> bytes:
    """The rules that topics and filters share [MQTT-4.7.3]."""
    if not text:
        raise TopicError(f"the {noun} is empty: it must be at least one character long")
    if "\0" in text:
        raise TopicError(f"{noun} {_shown(text)} contains the character U+0000: remove it")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise TopicError(
            f"{noun} {_shown(text)} contains half of a surrogate pair, which UTF-8 cannot carry: remove it"
        ) from None
    if len(encoded) > MAX_STRING_BYTES:
        raise TopicError(
            f"{noun} {_shown(text)} is {len(encoded):,} bytes long in UTF-8: {MAX_STRING_BYTES:,} are allowed"
        )
    return encoded


def _check_share(topic_filter: str, group: str, plain: str) -> None:
    problem = None
    if not group:  # [MQTT-4.8.2-1]
        problem = "has no group"
    elif "+" in group or "#" in group:  # [MQTT-4.8.2-2]
        problem = "has a wildcard in its group"
    elif not plain:
        problem = "has no filter after its group"
    if problem:
        raise TopicError(f"filter {_shown(topic_filter)} {problem}: write '$share/<group>/<filter>'")


def _plain_str(value: object, noun: str) -> str:
    """Take a str subclass (an enum member, for instance) by its characters, whatever it overrides."""
    if not isinstance(value, str):
        raise TopicError(f"a {noun} must be a str, not {type(value).__name__}")
    return str.__str__(value)


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}…"
