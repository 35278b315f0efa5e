"""What subscribing gives on an event loop: `Subscription` and `MessageIterator`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Self

from tars_mqtt._core.dispatch import Consumer, Taken
from tars_mqtt._core.registry import Registration
from tars_mqtt._core.timeout import DEFAULT, Timeout, seconds
from tars_mqtt.message import Message
from tars_mqtt.subscription import Registered

if TYPE_CHECKING:
    from tars_mqtt.aio.client import MQTTClient


class Subscription(Registered):
    """What `MQTTClient.subscribe` returns. An async context manager: leaving it unsubscribes."""

    def __init__(self, client: MQTTClient, registration: Registration) -> None:
        super().__init__(registration)
        self._client = client

    async def unsubscribe(self, timeout: Timeout = DEFAULT) -> None:
        """Stop; the handler is not called again, a call under way may still end. Idempotent."""
        client = self._client
        client._on_loop()
        limit = seconds(timeout, client.config.connect_timeout)
        # Without an answer nobody is called any more all the same; what still comes is dropped.
        with contextlib.suppress(TimeoutError):
            await client._outcome(client._engine.unregister(self._registration), limit)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.unsubscribe()


class MessageIterator(AsyncIterator[Message]):
    """What `MQTTClient.messages` returns. An async context manager: leaving it unsubscribes.

    One that nobody refers to any more is closed, a loop that was left with ``break`` for instance.
    """

    def __init__(self, client: MQTTClient, topic: str, qos: int) -> None:
        self._client = client
        self._arrived = arrived = asyncio.Event()
        self._registration = client._engine.register(topic, qos, None, None, {})
        self._consumer: Consumer = self._registration.consumer
        # Refers to the event alone: an iterator that is left alone can be collected.
        self._consumer.arrived = lambda: client._bridge.post(arrived.set)
        self._subscription: Subscription | None = None
        self._current: Taken | None = None

    async def __anext__(self) -> Message:
        message = await self.next(None)
        if message is None:
            raise StopAsyncIteration
        return message

    async def next(self, timeout: float | None) -> Message | None:
        """Return the next message; None once the iteration has ended.

        Raises:
            TimeoutError: None came in time.
        """
        self._client._on_loop()
        self._finish_current()
        if self._subscription is None:
            await self._open()
        dispatcher, reader = self._client._engine.dispatcher, asyncio.current_task()
        try:
            async with asyncio.timeout(seconds(timeout, 0.0)):
                while True:
                    self._arrived.clear()
                    self._current = dispatcher.next_nowait(self._consumer, reader)
                    if self._current is not None:
                        return self._current.delivery.message
                    if self._consumer.closed or dispatcher.stopping:
                        return None
                    await self._arrived.wait()
        except BaseException:
            dispatcher.left_alone(self._consumer)
            raise

    async def _open(self) -> None:
        self._subscription = await self._client._subscribed(
            self._registration, self._client.config.connect_timeout
        )

    def _finish_current(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            self._client._engine.dispatcher.finished(current)

    async def close(self) -> None:
        """Acknowledge the last message, and unsubscribe."""
        self._finish_current()
        await Subscription(self._client, self._registration).unsubscribe()

    async def __aenter__(self) -> Self:
        if self._subscription is None:
            await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if hasattr(self, "_current"):  # not where the filter was malformed
            self._client._engine.abandon(self._registration, self._current)
