"""What a handler gets (`Message`), and what a publish gives (`PublishReceipt`)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from types import MappingProxyType
from typing import TypeVar

from tars_mqtt._core.property import decode_properties, encode_properties
from tars_mqtt._core.timeout import seconds
from tars_mqtt.envelope import Envelope
from tars_mqtt.errors import AckTimeoutError, DecodeError, fresh

__all__ = ["Message", "PublishReceipt"]

T = TypeVar("T")


class Message:
    """One message as it arrived; shared by all handlers that it matches, so not to be changed.

    Attributes:
        topic: Where it was published.
        payload: The bytes.
        qos: 0, 1 or 2, as delivered.
        retain: Whether the broker had kept it, from before the subscription.
        dup: Whether the broker says that it sends it again.
    """

    __slots__ = ("_envelope", "_raw_properties", "dup", "payload", "qos", "retain", "topic")

    def __init__(
        self,
        topic: str,
        payload: bytes,
        qos: int = 0,
        retain: bool = False,
        dup: bool = False,
        raw_properties: bytes = b"",
    ) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.retain = retain
        self.dup = dup
        self._raw_properties = raw_properties
        self._envelope: Envelope | str | None = None

    @classmethod
    def new(
        cls,
        topic: str,
        payload: bytes,
        qos: int = 0,
        retain: bool = False,
        properties: Mapping[str, object] | None = None,
    ) -> Message:
        """Make what a handler would be given: for tests of handlers.

        Args:
            properties: As `MQTTClient.publish` takes them.
        """
        return cls(topic, payload, qos, retain, False, encode_properties(properties or {}))

    @property
    def properties(self) -> Mapping[str, object]:
        """The properties of MQTT 5, by the names of the standard in snake_case; empty in MQTT 3.1.1."""
        return MappingProxyType(decode_properties(self._raw_properties) if self._raw_properties else {})

    @property
    def envelope(self) -> Envelope:
        """The payload as an envelope; decoded once.

        Raises:
            DecodeError: It is none.
        """
        # Two threads may both decode it: the results are equal, and either may stay.
        envelope = self._envelope
        if envelope is None:
            try:
                envelope = Envelope.from_bytes(self.payload)
            except DecodeError as error:
                envelope = str(error)
            self._envelope = envelope
        if isinstance(envelope, str):
            raise DecodeError(envelope)
        return envelope

    def data_as(self, model: type[T]) -> T:
        """The envelope's data as an instance of *model*; see `Envelope.data_as`."""
        return self.envelope.data_as(model)

    def __repr__(self) -> str:
        retained = ", retained" if self.retain else ""
        return f"<Message on {self.topic!r}, {len(self.payload)} bytes, qos {self.qos}{retained}>"


def _after_fork_in_child() -> None:
    PublishReceipt._lock = threading.Lock()  # a thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

_PENDING, _SENT, _DONE, _CANCELLED = range(4)


class PublishReceipt:
    """Tells what became of one outgoing message. Any thread.

    Attributes:
        envelope_id: The id of the envelope; None for a raw publish.
        topic: Where the message goes.
        qos: 0, 1 or 2.
    """

    # An outage may leave as many of these as a queue may hold, so two attributes that are never there at
    # the same time are one: *_then* is what to call when it is done, and once it is, what went wrong.
    __slots__ = ("__weakref__", "_state", "_then", "envelope_id", "qos", "topic")

    # One lock for all receipts: it is held for a few steps, and a lock each would be most of their size.
    _lock = threading.Lock()

    def __init__(self, envelope_id: str | None, topic: str, qos: int) -> None:
        self.envelope_id = envelope_id
        self.topic = topic
        self.qos = qos
        self._state = _PENDING if qos else _DONE  # QoS 0 has no acknowledgement
        self._then: list[Callable[[PublishReceipt], None]] | BaseException | None = None

    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._state >= _DONE

    def cancelled(self) -> bool:
        """Whether the message was taken back."""
        return self._state == _CANCELLED

    def cancel(self) -> bool:
        """Take the message back while it is unsent; False when it is too late."""
        return self._end(_CANCELLED, None, _PENDING) or self._state == _CANCELLED

    def result(self, timeout: float | None = None) -> str | None:
        """Wait for the broker's acknowledgement and return the envelope's id.

        Args:
            timeout: Seconds; None waits for ever, 0 does not wait.

        Raises:
            AckTimeoutError: It did not come in time; the message is still on its way.
            PublishRejectedError, ClosedError: There will be none.
            concurrent.futures.CancelledError: The message was taken back.
        """
        error = self.exception(timeout)
        if error is not None:
            raise fresh(error)
        return self.envelope_id

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return what went wrong; None if nothing did.

        Raises:
            AckTimeoutError: Nothing is known in time.
            concurrent.futures.CancelledError: The message was taken back.
        """
        if self._state < _DONE:
            limit = seconds(timeout, 0.0)
            if not self._wait(limit):
                raise not_acknowledged(self.topic, limit, self)
        if self._state == _CANCELLED:
            raise CancelledError(f"the message to {self.topic!r} was taken back")
        return self._error

    @property
    def _error(self) -> BaseException | None:
        return self._then if isinstance(self._then, BaseException) else None

    def _wait(self, limit: float | None) -> bool:
        """Wait until it is known what became of it; False when the time was up first."""
        if limit == 0 or self.done():
            return self.done()
        told = threading.Lock()
        told.acquire()

        def tell(_: PublishReceipt) -> None:
            told.release()

        self._add_done_callback(tell)
        try:
            told.acquire(timeout=-1 if limit is None else limit)
        finally:
            self._remove_done_callback(tell)
        return self.done()

    def __repr__(self) -> str:
        state = ("queued", "sent", "failed" if self._error else "done", "cancelled")[self._state]
        return f"<PublishReceipt {self.envelope_id or ''} to {self.topic!r}, qos {self.qos}, {state}>"

    # -- for the engine -----------------------------------------------------------------------

    def _add_done_callback(self, callback: Callable[[PublishReceipt], None]) -> None:
        """Have *callback* called once it is done, at once if it is; on the thread that settles it."""
        with self._lock:
            if self._state < _DONE:
                if not isinstance(self._then, list):
                    self._then = []
                self._then.append(callback)
                return
        callback(self)

    def _remove_done_callback(self, callback: Callable[[PublishReceipt], None]) -> None:
        """Undo `_add_done_callback`, unless it has been called: who asks again and again shall leave nothing."""
        with self._lock:
            if isinstance(self._then, list) and callback in self._then:
                self._then.remove(callback)

    def _mark_sent(self) -> bool:
        """The message is about to be sent, once more perhaps; False when it was taken back before."""
        with self._lock:
            if self._state > _SENT:
                return False
            self._state = _SENT
            return True

    def _settle(self) -> None:
        """The broker has it."""
        self._end(_DONE, None, _SENT)

    def _fail(self, error: BaseException) -> None:
        """There will be no acknowledgement."""
        self._end(_DONE, error, _SENT)

    def _withdraw(self, error: BaseException) -> None:
        """Take the message back while it is unsent, for a reason of ours."""
        self._end(_DONE, error, _PENDING)

    def _end(self, state: int, error: BaseException | None, latest: int) -> bool:
        """Go over to *state*, unless it has got further than *latest*."""
        with self._lock:
            if self._state > latest:
                return False
            callbacks = self._then
            self._then = error
            self._state = state  # last: whoever reads it without the lock finds the rest
        if isinstance(callbacks, list):  # it was not done before
            for callback in callbacks:
                callback(self)
        return True


def not_acknowledged(topic: str, limit: float | None, receipt: object) -> AckTimeoutError:
    """What a wait of *limit* seconds ends with."""
    return AckTimeoutError(
        f"no acknowledgement for the message to {topic!r} within {limit:.3g} s; "
        "it is still on its way, the receipt will tell",
        receipt,
    )
