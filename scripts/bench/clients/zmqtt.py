"""zmqtt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import zmqtt

from bench.event import decode, encode
from bench.job import Job
from bench.looped import LoopedClient


class Zmqtt(LoopedClient):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._client = zmqtt.create_client("127.0.0.1", job.port, client_id="bench", version="3.1.1")
        self._readers: list[asyncio.Task[None]] = []

    async def connect(self, handle: Callable[[Any], None] | None = None) -> None:
        await self._client.connect()
        for topic_filter in self.job.topic_filters:
            assert handle is not None
            subscription = self._client.subscribe(topic_filter, qos=zmqtt.QoS(self.job.qos))
            await subscription.start()
            self._readers.append(asyncio.create_task(self._read(subscription, handle)))

    async def _read(self, subscription: zmqtt.Subscription, handle: Callable[[Any], None]) -> None:
        async for message in subscription:
            handle(decode(message.payload))

    async def publish(self, topic: str, event_type: str, event_data: dict[str, Any], *, qos: int = 0) -> None:
        await self._client.publish(topic, encode(event_type, event_data), qos=zmqtt.QoS(qos))

    async def leave(self) -> None:
        await self._client.disconnect()
