"""Direct access to paho-mqtt on an event loop: what the asyncio client's ``.client`` is."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
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
        self._boxes: list[asyncio.Queue[Message]] = []
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
        """Iterate over what arrives; what arrived before the first iteration comes first."""
        box: asyncio.Queue[Message] = asyncio.Queue(self._client.config.max_pending)
        while self._early:
            box.put_nowait(self._early.popleft())
        self._boxes.append(box)
        try:
            yield _drain(box)
        finally:
            self._boxes.remove(box)

    async def _arrive(self, message: Message) -> None:
        if not self._boxes:
            self._early.append(message)
        for box in tuple(self._boxes):
            await box.put(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client._engine.client, name)


async def _drain(box: asyncio.Queue[Message]) -> AsyncIterator[Message]:
    while True:
        yield await box.get()
