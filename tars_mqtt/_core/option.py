"""What may be said about a handler when it is subscribed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import TypedDict

from tars_mqtt._core.recovery import RetryOn
from tars_mqtt._core.timeout import DEFAULT, Timeout, seconds
from tars_mqtt.message import Message

OrderBy = str | Callable[[Message], Hashable]


class HandlerOptions(TypedDict, total=False):
    """The keyword options of ``subscribe`` and ``on``."""

    concurrency: int | None
    """How many messages may be in work at once: 1 unless given, with *order_by* as many as there are workers."""
    order_by: OrderBy | None
    """``"topic"``, or a quick function of the `Message` (it runs on the network thread): order is kept for
    each key, different keys go side by side."""
    retries: int
    """How often a message whose handler raised is tried again, before the next one of its lane: order is
    kept, other subscriptions and keys go on. 0 unless given."""
    retry_on: RetryOn
    """Which failures are worth another attempt: a class of exceptions, a tuple of them, or a function of the
    exception. All of them, unless given. A time-out counts as a ``TimeoutError``."""
    retry_delay: float
    """Seconds before the first retry, doubled for each further one, with jitter. 0.5 unless given."""
    dead_letter: str | None
    """A topic, ``"dead/{topic}"`` for instance, that gets an envelope with each message which no attempt
    could handle, or which is not what the handler asks for."""
    handler_timeout: Timeout
    """Seconds after which a handler that does not return counts as failed; the setting of that name unless
    given, None for never."""


def checked(options: HandlerOptions, workers: int) -> HandlerOptions:
    """Return *options* complete.

    Raises:
        TypeError: An option that there is not.
        ValueError: A value out of range.
    """
    unknown = options.keys() - HandlerOptions.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"there is no option {min(unknown)!r}: choose from {', '.join(HandlerOptions.__annotations__)}"
        )
    order_by = options.get("order_by")
    if order_by is not None and order_by != "topic" and not callable(order_by):
        raise ValueError(f"order_by must be 'topic' or a function of the message, not {order_by!r}")
    retry_on = options.get("retry_on", BaseException)
    if not _says_what_failed(retry_on):
        raise TypeError(
            f"retry_on must be a class of exceptions, a tuple of them, or a function of one, not {retry_on!r}"
        )
    for name, function in (("order_by", order_by), ("retry_on", retry_on)):
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{name} must be a plain function: it is called, and not awaited")
    concurrency = options.get("concurrency")
    if concurrency is None:
        concurrency = 1 if order_by is None else workers
    _whole("concurrency", concurrency, 1)
    retries = options.get("retries", 0)
    _whole("retries", retries, 0)
    retry_delay = options.get("retry_delay", 0.5)
    if retry_delay is None:
        raise ValueError("retry_delay must be a number of seconds, at least 0, not None")
    retry_delay = seconds(retry_delay, 0.5, "retry_delay") or 0.0
    handler_timeout = options.get("handler_timeout", DEFAULT)
    seconds(handler_timeout, 0.0, "handler_timeout")
    return HandlerOptions(
        concurrency=concurrency,
        order_by=order_by,
        retries=retries,
        retry_on=retry_on,
        retry_delay=retry_delay,
        dead_letter=options.get("dead_letter"),
        handler_timeout=handler_timeout,
    )


def _says_what_failed(retry_on: object) -> bool:
    if not isinstance(retry_on, (type, tuple)):
        return callable(retry_on)
    classes = retry_on if isinstance(retry_on, tuple) else (retry_on,)
    return all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in classes)


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")
