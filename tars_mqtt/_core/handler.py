"""One handler: what it asks for, what it is given, and what becomes of its failure."""

from __future__ import annotations

import functools
import inspect
import logging
import typing
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from tars_mqtt._core.claim import Claims
from tars_mqtt._core.lane import Delivery
from tars_mqtt._core.recovery import Outcome
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.throttle import Throttle
from tars_mqtt.context import current_message, log_fields
from tars_mqtt.envelope import Envelope
from tars_mqtt.errors import DecodeError
from tars_mqtt.message import Message

logger = logging.getLogger("tars_mqtt.dispatch")

Handler = Callable[..., Any]
Convert = Callable[[Message], Any]

_NO_MODELS = (str, int, float, bool, list, dict, bytearray, memoryview)
"""What data may be, but a handler should not ask for: it might mean the payload."""


def argument_of(handler: Handler) -> Convert:
    """Return what makes a handler's argument of a message, as its first parameter's annotation asks.

    Raises:
        TypeError: It is not callable with one argument, or its annotation cannot be served.
    """
    if not callable(handler):
        raise TypeError(f"the handler must be callable with one argument, not {handler!r}")
    wanted = _first_annotation(handler)
    if wanted in (inspect.Parameter.empty, Any, bytes, "bytes"):
        return attrgetter("payload")
    if wanted is Message:
        return lambda message: message
    if wanted is Envelope:
        return attrgetter("envelope")
    if isinstance(wanted, type) and wanted not in _NO_MODELS:
        from tars_mqtt.model import is_model  # late: it brings cattrs along

        if is_model(wanted):
            return lambda message: message.envelope.data_as(wanted)
    raise TypeError(
        f"the handler asks for {wanted!r}: annotate its first parameter with bytes, Message, Envelope, "
        "or an attrs, dataclass or pydantic class (Envelope has its data under .data)"
    )


def _first_annotation(handler: Handler) -> Any:
    try:
        signature = inspect.signature(handler)
    except ValueError:
        return inspect.Parameter.empty  # a builtin without a signature, such as list.append
    try:
        signature.bind(None)
    except TypeError:
        raise TypeError(
            f"the handler must be callable with one argument, which {signature} is not: "
            "annotated with Message, that has topic, payload and the rest"
        ) from None
    annotation = next(iter(signature.parameters.values())).annotation
    if isinstance(annotation, str):
        # Under `from __future__ import annotations` the annotation is text.
        annotation = _resolved(annotation, _function_behind(handler))
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _resolved(annotation: str, function: Any) -> Any:
    """What the text stands for; the function's other annotations need not stand for anything."""

    def stub() -> None: ...

    stub.__annotations__ = {"first": annotation}
    # Our own names are known also where they are imported for the type checker alone.
    names = {"Message": Message, "Envelope": Envelope} | getattr(function, "__globals__", {})
    try:
        return typing.get_type_hints(stub, names)["first"]
    except Exception as error:
        raise TypeError(f"the handler's annotation {annotation!r} cannot be resolved: {error}") from error


def _function_behind(handler: Any) -> Any:
    """The function whose first annotation counts, behind decorators, partials, objects and classes."""
    while True:
        if isinstance(handler, functools.partial):
            handler = handler.func
        elif hasattr(handler, "__wrapped__"):
            handler = handler.__wrapped__
        elif isinstance(handler, type):
            handler = handler.__init__  # type: ignore[misc]
        elif inspect.isroutine(handler):
            return handler
        else:
            handler = type(handler).__call__


def is_coroutine_function(handler: Handler) -> bool:
    """Whether calling *handler* gives a coroutine, also for objects with an ``async def __call__``."""
    # A decorator may make a coroutine function of a plain one, or pass on the coroutine of what it wraps.
    candidates = (handler, inspect.unwrap(handler), getattr(type(handler), "__call__", None))  # noqa: B004
    return any(map(inspect.iscoroutinefunction, candidates)) or (
        hasattr(handler, "func") and is_coroutine_function(handler.func)
    )


def name_of(handler: Handler) -> str:
    """What a log calls it, and what it is known by across restarts."""
    while isinstance(handler, functools.partial):  # whose repr would show its arguments
        handler = handler.func
    return str(getattr(handler, "__qualname__", type(handler).__qualname__))


def _refuse_work_undone(result: object) -> None:
    """Refuse what a call has made instead of doing the work: a lambda around a coroutine function, for instance."""
    if inspect.iscoroutine(result):
        result.close()  # or Python warns of it later, when nobody knows whose it was
    elif not (inspect.isgenerator(result) or inspect.isasyncgen(result)):
        return
    raise TypeError(
        f"the handler returned a {type(result).__name__} and did nothing: "
        "write it as a plain function, or for tars_mqtt.aio as an async def, without yield"
    )


def _in_words(error: BaseException) -> str:
    name = type(error).__qualname__
    try:
        return f"{name}: {error}"
    except Exception:  # its text is the user's code, too
        return name


class HandlerCall:
    """The steps around one call of a handler. Any thread; never raises.

    `begin`, then the call, then `succeeded` or `failed`. Calling the object does all three for a plain function.
    """

    def __init__(
        self,
        handler: Handler,
        claims: Claims,
        counters: Counters,
        client_id: str,
        verdict: Callable[[BaseException], Outcome] = lambda _: Outcome.FAILED,
    ) -> None:
        self.handler = handler
        self._convert = argument_of(handler)
        self._claims = claims
        self._counters = counters
        self._client_id = client_id
        self._verdict = verdict
        self._undecodable_ones = Throttle()  # what others send must not fill the log

    def __call__(self, delivery: Delivery) -> Outcome:
        argument = self.begin(delivery)
        if argument.__class__ is Outcome:
            return argument
        token = current_message.set(delivery.message)
        try:
            result = self.handler(argument)
            if result is not None:
                _refuse_work_undone(result)
        except BaseException as error:  # SystemExit too: a handler ends itself, not the service
            return self.failed(delivery, error)
        finally:
            current_message.reset(token)
        return self.succeeded(delivery) if self._claims.wanted else Outcome.HANDLED

    def begin(self, delivery: Delivery) -> Any:
        """Return the handler's argument, or the `Outcome` where there is nothing to call it for."""
        message = delivery.message
        if self._claims.wanted and not self._claims.claim(delivery):
            return Outcome.SKIPPED
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "handling a message of %r with %d bytes",
                message.topic,
                len(message.payload),
                extra=log_fields(message, self._client_id),
            )
        try:
            return self._convert(message)
        except DecodeError as error:
            return self._undecodable(delivery, error)
        except BaseException as error:
            return self.failed(delivery, error)

    def timed_out(self, delivery: Delivery, timeout: float) -> Outcome:
        """The handler did not return in time: the next attempt, or a redelivery, will be handled."""
        self._claims.release(delivery)
        message = delivery.message
        delivery.error = f"the handler did not return within {timeout:g} s"
        logger.warning(
            "handler %s did not return within %g s on a message of %r, which counts as failed",
            name_of(self.handler),
            timeout,
            message.topic,
            extra=log_fields(message, self._client_id),
        )
        self._counters.add("handler_timeouts")
        return self._verdict(TimeoutError(delivery.error))

    def succeeded(self, delivery: Delivery) -> Outcome:
        """The handler returned."""
        if self._claims.wanted:
            self._claims.keep(delivery)
        return Outcome.HANDLED

    def failed(self, delivery: Delivery, error: BaseException) -> Outcome:
        """The handler raised: the next attempt, or a redelivery, will be handled."""
        self._claims.release(delivery)
        self._report(delivery.message, error)
        if not delivery.given_up:
            delivery.error = _in_words(error)
            self._counters.add("handler_failures")
        return self._verdict(error)

    def _report(self, message: Message, error: BaseException) -> None:
        logger.error(
            "handler %s failed on a message of %r",
            name_of(self.handler),
            message.topic,
            exc_info=error,
            extra=log_fields(message, self._client_id),
        )

    def _undecodable(self, delivery: Delivery, error: DecodeError) -> Outcome:
        """The payload is not what the handler asks for."""
        # Not kept: its dead letter is still to come, and a kill may come before.
        self._claims.release(delivery)
        message = delivery.message
        delivery.error = f"DecodeError: {error}"
        if count := self._undecodable_ones.admit():
            logger.warning(
                "a message of %r with %d bytes is not what its handler asks for: %s%s",
                message.topic,
                len(message.payload),
                error,
                f"; {count - 1} others since the last warning" if count > 1 else "",
                extra=log_fields(message, self._client_id),
            )
        self._counters.add("decode_failures")
        return Outcome.HOPELESS
