"""What a setting may be: each rule takes a value, and says what is wrong with it or nothing."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from tars_mqtt.errors import TopicError
from tars_mqtt.payload import health_topic, heartbeat_topic
from tars_mqtt.topics import MAX_STRING_BYTES, check_topic
from tars_mqtt.url import parse_proxy, parse_urls

Rule: TypeAlias = Callable[[Any], str | None]

_LONGEST_WAIT: Final = 1_000_000.0  # eleven days; selectors count milliseconds in 32 bits, and overflow at 24


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def boolean(value: object) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def whole(low: int, high: float = math.inf) -> Rule:
    must = f"must be a whole number, at least {low:,}" + (f" and at most {high:,}" if high < math.inf else "")
    return lambda value: None if is_int(value) and low <= value <= high else must


def seconds(low: float, high: float = _LONGEST_WAIT, *, above: bool = False, whole: bool = False) -> Rule:
    number = "whole number" if whole else "number"
    must = f"must be a {number} of seconds, {'above' if above else 'at least'} {low:,}"
    if high < math.inf:
        must += f" and at most {high:,.0f}"

    def rule(value: object) -> str | None:
        if not isinstance(value, float):
            return must
        if not math.isfinite(value):
            return "must be a finite number"
        inside = low <= value <= high and not (above and value == low)
        return None if inside and (value.is_integer() or not whole) else must

    return rule


def one_of(*choices: str) -> Rule:
    must = f"must be one of {', '.join(map(repr, choices))}"
    return lambda value: None if isinstance(value, str) and value in choices else must


def text(forbidden: str, description: str, *, required: bool = False) -> Rule:
    """Text that goes on the wire; half of a surrogate pair cannot, whatever else is *forbidden*."""
    pattern = re.compile(f"[{forbidden}\ud800-\udfff]")

    def rule(value: object) -> str | None:
        if value is None or value == "":
            return "is required" if required else None
        if not isinstance(value, str):
            return "must be a str"
        if pattern.search(value):
            return f"must not contain {description}"
        size = len(value.encode())
        return None if size <= MAX_STRING_BYTES else f"must be at most {MAX_STRING_BYTES:,} bytes long"

    return rule


timeout = seconds(0.0, above=True)
client_id = text("\x00-\x1f\x7f-\x9f", "control characters or lone surrogates", required=True)
username = text("\x00", "the character U+0000 or lone surrogates")
password = text("", "lone surrogates")


def url(value: object) -> str | None:
    if value is None or value == "":
        return "is required: 'mqtt://localhost:1883', for instance"
    if not isinstance(value, str):
        return "must be a str"
    try:
        parse_urls(value)
    except ValueError as error:
        return f"is wrong: {error}"
    return None


def source_name(value: object) -> str | None:
    if not isinstance(value, str):
        return "must be a str"
    if not {"/", "+", "#"}.isdisjoint(value):
        return "must be one topic level, without '/', '+', '#': set source_name, which else is the client_id"
    try:
        for topic in (health_topic(value), heartbeat_topic(value)):
            check_topic(topic)
    except TopicError as error:
        return f"must fit into a topic: {error}"
    return None


def path(value: object) -> str | None:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if path is None or (isinstance(path, str) and path and "\0" not in path):
        return None
    return "must be a path: a str or a PathLike of str, not empty and without the character U+0000"


def function(value: object) -> str | None:
    return None if value is None or callable(value) else "must be a function"


def proxy(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return "must be a str"
    try:
        parse_proxy(value)
    except ValueError as error:
        return f"is wrong: {error}"
    return None


_HEADER_NAME: Final = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # a token of RFC 9110, section 5.6.2
_HEADER_VALUE: Final = re.compile("[\t\x20-\x7e\xa0-\xff]*")
_OUR_HEADERS: Final = ("upgrade", "connection", "content-length", "transfer-encoding")


def headers(value: object) -> str | None:
    if value is None or callable(value):
        return None
    if not isinstance(value, Mapping):
        return (
            "must be a dict, a function, or text: 'Name: value', several separated by commas or line breaks"
        )
    for name, text in value.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            return "must have names of letters, digits and '-'"
        if name.lower() in _OUR_HEADERS or name.lower().startswith("sec-websocket-"):
            return f"must not have {name!r}, which belongs to the handshake"
        if not isinstance(text, str) or not _HEADER_VALUE.fullmatch(text):
            return f"must have text without line breaks for {name!r}"
    return None
