"""One handler: what it asks for, what it is given, and what becomes of its failure."""

from __future__ import annotations

import inspect
import logging
import typing
from collections.abc import Callable, Hashable
from typing import Any

from tars_mqtt._core.lane import Delivery
from tars_mqtt._core.stats import Counters
from tars_mqtt.context import current_message
from tars_mqtt.dedup import MessageDeduplicator
from tars_mqtt.envelope import Envelope
from tars_mqtt.errors import DecodeError
from tars_mqtt.message import Message

logger = logging.getLogger("tars_mqtt.dispatch")

Handler = Callable[..., Any]
Convert = Callable[[Message], Any]


def argument_of(handler: Handler) -> Convert:
    """Return what makes a handler's argument of a message, as its first parameter's annotation asks.

    Raises:
        TypeError: It is not callable with one argument, or its annotation cannot be served.
    """
    if not callable(handler):
        raise TypeError(f"the handler must be callable with one argument, not {handler!r}")
    wanted = _first_annotation(handler)
    if wanted in (inspect.Parameter.empty, Any, bytes, "bytes"):
        return lambda message: message.payload
    if wanted is Message:
        return lambda message: message
    if wanted is Envelope:
        return lambda message: message.envelope
    if isinstance(wanted, type) and wanted not in (str, int, float, bool, list, dict, bytearray, memoryview):
        return lambda message: message.envelope.data_as(wanted)
    raise TypeError(
        f"the handler asks for {wanted!r}: annotate its first parameter with bytes, Message, Envelope, "
        "or an attrs, dataclass or pydantic class"
    )


def _first_annotation(handler: Handler) -> Any:
    try:
        signature = inspect.signature(handler)
    except ValueError:
        return inspect.Parameter.empty  # a builtin without a signature, such as list.append
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(f"the handler must be callable with one argument: {error}") from None
    first = next(iter(signature.parameters.values()))
    if not isinstance(first.annotation, str):
        return first.annotation
    # Under `from __future__ import annotations` the annotation is text.
    function = inspect.unwrap(handler) if inspect.isroutine(handler) else type(handler).__call__
    try:
        return typing.get_type_hints(function).get(first.name, first.annotation)
    except Exception as error:
        if first.annotation == "bytes":
            return bytes
        raise TypeError(f"the handler's annotation {first.annotation!r} cannot be resolved: {error}") from error


def is_coroutine_function(handler: Handler) -> bool:
    """Whether calling *handler* gives a coroutine, also for objects with an ``async def __call__``."""
    return inspect.iscoroutinefunction(inspect.unwrap(handler) if callable(handler) else handler) or (
        inspect.iscoroutinefunction(getattr(type(handler), "__call__", None))
    ) or (hasattr(handler, "func") and is_coroutine_function(handler.func))


class HandlerCall:
    """The steps around one call of a handler, for any kind of dispatcher. Any thread; never raises.

    `begin`, then the call, then `succeeded` or `failed`. Calling the object does all three for a
    plain function.
    """

    def __init__(
        self,
        handler: Handler,
        number: int,
        counters: Counters,
        deduplicator: MessageDeduplicator | None,
        correlation: typing.Literal["field", "id"],
        client_id: str,
    ) -> None:
        self.handler = handler
        self._convert = argument_of(handler)
        self._number = number
        self._counters = counters
        self._deduplicator = deduplicator
        self._correlation = correlation
        self._client_id = client_id

    def begin(self, message: Message) -> tuple[Hashable | None, Any] | None:
        """Return the claim and the handler's argument; None when the handler is not to be called."""
        claim = None
        if self._deduplicator is not None:
            claim = self._claim_key(message)
            if not self._claimed(claim, message):
                return None
        try:
            return claim, self._convert(message)
        except DecodeError as error:
            self._undecodable(message, claim, error)
        except BaseException as error:
            self.failed(message, claim, error)
        return None

    def __call__(self, delivery: Delivery) -> bool:
        message = delivery.message
        begun = self.begin(message)
        if begun is None:
            return False
        claim, argument = begun
        token = current_message.set(message)
        try:
            self.handler(argument)
        except BaseException as error:  # SystemExit too: a handler ends itself, not the service
            self.failed(message, claim, error)
            return False
        finally:
            current_message.reset(token)
        self.succeeded(claim)
        return True

    def _claim_key(self, message: Message) -> Hashable | None:
        try:
            return self._number, message.envelope.dedup_key(self._correlation)
        except DecodeError:
            return None  # without an envelope there is no id to know it by

    def _claimed(self, claim: Hashable | None, message: Message) -> bool:
        if claim is None or self._deduplicator is None or self._deduplicator.claim(claim):
            return True
        self._counters.add("duplicates")
        logger.debug("filtered a duplicate on %r", message.topic, extra=self._extra(message))
        return False

    def succeeded(self, claim: Hashable | None) -> None:
        """The handler returned."""
        if claim is not None and self._deduplicator is not None:
            self._deduplicator.keep(claim)

    def failed(self, message: Message, claim: Hashable | None, error: BaseException) -> None:
        """The handler raised: a redelivery will be handled."""
        if claim is not None and self._deduplicator is not None:
            self._deduplicator.release(claim)
        self._counters.add("handler_failures")
        logger.error(
            "handler %s failed on a message of %r",
            getattr(self.handler, "__qualname__", repr(self.handler)),
            message.topic,
            exc_info=error,
            extra=self._extra(message),
        )

    def _undecodable(self, message: Message, claim: Hashable | None, error: DecodeError) -> None:
        """The payload is not what the handler asks for."""
        if claim is not None and self._deduplicator is not None:
            self._deduplicator.keep(claim)
        self._counters.add("decode_failures")
        logger.warning(
            "a message of %r with %d bytes is not what its handler asks for: %s",
            message.topic,
            len(message.payload),
            error,
            extra=self._extra(message),
        )

    def _extra(self, message: Message) -> dict[str, Any]:
        fields: dict[str, Any] = {"client_id": self._client_id, "topic": message.topic, "qos": message.qos}
        try:
            envelope = message.envelope
        except DecodeError:
            return fields
        return fields | {
            "event_type": envelope.type,
            "envelope_id": envelope.id,
            "correlation_id": envelope.correlation_id,
        }
