"""What subscribing gives on an event loop: `Subscription` and `MessageIterator`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import Future
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
        self._asked: Future[None] | None = None
        """The broker's answer to the subscription, once it is asked."""
        self._current: Taken | None = None

    async def __anext__(self) -> Message:
        message = await self.next(None)
        if message is None:
            raise StopAsyncIteration
        return message

    async def next(self, timeout: float | None = None) -> Message | None:
        """Return the next message; None once the iteration has ended.

        Args:
            timeout: Seconds; ``None`` waits for ever. The first call waits for the subscription, too.

        Raises:
            TimeoutError: None came in time.
            SubscribeError: The broker refused, or did not answer within ``connect_timeout``.
        """
        self._client._on_loop()
        self._finish_current()
        dispatcher, reader = self._client._engine.dispatcher, asyncio.current_task()
        limit = asyncio.timeout(seconds(timeout, 0.0))
        try:
            async with limit:
                await self._open()
                while True:
                    self._arrived.clear()
                    self._current = dispatcher.next_nowait(self._consumer, reader)
                    if self._current is not None:
                        return self._current.delivery.message
                    if self._consumer.closed or dispatcher.stopping:
                        return None
                    await self._arrived.wait()
        except BaseException as error:
            dispatcher.left_alone(self._consumer)
            if isinstance(error, TimeoutError) and limit.expired():
                raise TimeoutError("no message came in time") from None
            raise

    async def _open(self) -> None:
        """Subscribe, once; who waits no longer for the answer leaves that to the next one who asks."""
        if self._asked is None:
            self._asked = self._client._engine.subscribe(self._registration)
        elif self._consumer.closed or (self._asked.done() and self._asked.exception() is None):
            return
        await self._client._answered(self._asked, self._registration, self._client.config.connect_timeout)

    def _finish_current(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            self._client._engine.dispatcher.finished(current)

    async def close(self) -> None:
        """Acknowledge the last message, and unsubscribe."""
        self._finish_current()
        await Subscription(self._client, self._registration).unsubscribe()

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if hasattr(self, "_current"):  # not where the filter was malformed
            self._client._engine.abandon(self._registration, self._current)
