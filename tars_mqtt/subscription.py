"""What subscribing gives: `Subscription`, and `MessageIterator` where messages are iterated over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from tars_mqtt._core.dispatch import Taken
from tars_mqtt._core.engine import Engine
from tars_mqtt._core.registry import Registration
from tars_mqtt._core.timeout import DEFAULT, Timeout, seconds
from tars_mqtt.message import Message


class Registered:
    """What both clients' subscriptions say of themselves."""

    def __init__(self, registration: Registration) -> None:
        self._registration = registration

    @property
    def topic(self) -> str:
        """The filter."""
        return self._registration.topic_filter

    @property
    def qos(self) -> int:
        """The QoS that was asked for."""
        return self._registration.qos

    @property
    def active(self) -> bool:
        """Whether the handler is still called."""
        return not self._registration.consumer.closed

    def __repr__(self) -> str:
        return f"<Subscription {self.topic!r}, qos {self.qos}, {'active' if self.active else 'ended'}>"


class Subscription(Registered):
    """What `MQTTClient.subscribe` returns. A context manager: leaving it unsubscribes."""

    def __init__(self, engine: Engine, registration: Registration) -> None:
        super().__init__(registration)
        self._engine = engine

    def unsubscribe(self, timeout: Timeout = DEFAULT) -> None:
        """Stop; the handler is not called again, a call under way may still end. Idempotent.

        Args:
            timeout: Seconds to wait for the broker's word; ``connect_timeout`` unless given.
        """
        limit = seconds(timeout, self._engine.config.connect_timeout)
        try:
            self._engine.unregister(self._registration).result(limit)
        except TimeoutError:
            # Nobody is called any more; what the broker still sends is dropped.
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unsubscribe()


class MessageIterator(Iterator[Message]):
    """What `MQTTClient.messages` returns. A context manager: leaving it unsubscribes.

    One that nobody refers to any more is closed, a loop that was left with ``break`` for instance.
    """

    def __init__(self, engine: Engine, subscription: Subscription, registration: Registration) -> None:
        self._engine = engine
        self._subscription = subscription
        self._registration = registration
        self._consumer = registration.consumer
        self._current: Taken | None = None

    def __next__(self) -> Message:
        message = self.next(None)
        if message is None:
            raise StopIteration
        return message

    def next(self, timeout: float | None = None) -> Message | None:
        """Return the next message; None once the iteration has ended.

        Args:
            timeout: Seconds; ``None`` waits for ever, ``0`` does not wait.

        Raises:
            TimeoutError: None came in time.
        """
        self._finish_current()
        self._engine.life.check()
        self._current = self._engine.dispatcher.next(self._consumer, seconds(timeout, 0.0))
        return None if self._current is None else self._current.delivery.message

    def _finish_current(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            self._engine.dispatcher.finished(current)

    def close(self) -> None:
        """Acknowledge the last message, and unsubscribe."""
        self._finish_current()
        self._subscription.unsubscribe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._engine.abandon(self._registration, self._current)
