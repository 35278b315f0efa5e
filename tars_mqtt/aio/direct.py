"""Direct access to paho-mqtt on an event loop: what the asyncio client's ``.client`` is."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

from tars_mqtt.message import Message

if TYPE_CHECKING:
    from tars_mqtt.aio.client import MQTTClient
    from tars_mqtt.aio.subscription import Subscription


class PahoFace:
    """The paho-mqtt client behind an asyncio client, with what would block or call back made awaitable.

    `subscribe` and `messages` go together: a message of any filter subscribed here comes out of
    every open `messages`. All other attributes are paho's own.
    """

    def __init__(self, client: MQTTClient) -> None:
        self._client = client
        self._subscriptions: dict[str, Subscription] = {}
        self._boxes: list[Box] = []
        self._early: deque[Message] = deque(maxlen=client.config.max_pending)

    async def subscribe(self, topic: str, qos: int = 0) -> None:
        """Subscribe; raises as `MQTTClient.subscribe`."""
        subscription = await self._client.subscribe(topic, self._arrive, qos)
        before = self._subscriptions.get(topic)
        self._subscriptions[topic] = subscription
        if before is not None:
            await before.unsubscribe()

    async def unsubscribe(self, topic: str) -> None:
        """Undo `subscribe`."""
        subscription = self._subscriptions.pop(topic, None)
        if subscription is not None:
            await subscription.unsubscribe()

    async def publish(
        self, topic: str, payload: bytes | str = b"", qos: int = 0, retain: bool = False
    ) -> None:
        """Publish raw bytes; see `MQTTClient.publish`."""
        await self._client.publish(topic, payload, qos=qos, retain=retain)

    @contextlib.asynccontextmanager
    async def messages(self) -> AsyncIterator[AsyncIterator[Message]]:
        """Iterate over what arrives; what arrived while nobody did, or was left by the last who did, comes first."""
        box = Box(self._client.config.max_pending, self._early)
        self._early.clear()
        self._boxes.append(box)
        try:
            yield _drain(box)
        finally:
            self._boxes.remove(box)
            for message in box.close():
                if not self._boxes:
                    self._keep(message)

    async def _arrive(self, message: Message) -> None:
        taken = False
        while self._boxes and not taken:  # again, where it has waited for one that was closed then
            for box in tuple(self._boxes):
                taken = await box.put(message) or taken
        if not taken:
            self._keep(message)

    def _keep(self, message: Message) -> None:
        """For the next who iterates; the oldest makes room where too many are kept."""
        if len(self._early) == self._early.maxlen:
            self._client._engine.counters.drop("max_pending")
        self._early.append(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client._engine.client, name)


class Box:
    """What has arrived for one iteration. Owned by the loop's thread.

    Unlike a queue it can be closed: nobody waits for room in it then.
    """

    def __init__(self, most: int, messages: Iterable[Message]) -> None:
        self._most = most
        self._messages = deque(messages)
        self._closed = False
        self._came = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, message: Message) -> bool:
        """Wait for room; False when it is closed."""
        while len(self._messages) >= self._most and not self._closed:
            self._room.clear()
            await self._room.wait()
        if not self._closed:
            self._messages.append(message)
            self._came.set()
        return not self._closed

    async def get(self) -> Message:
        """Wait for a message."""
        while not self._messages:
            self._came.clear()
            await self._came.wait()
        self._room.set()
        return self._messages.popleft()

    def close(self) -> Iterable[Message]:
        """Take nothing more; returns what nobody has got."""
        self._closed = True
        self._room.set()
        left, self._messages = self._messages, deque()
        return left


async def _drain(box: Box) -> AsyncIterator[Message]:
    while True:
        yield await box.get()
