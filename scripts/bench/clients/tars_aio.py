"""This package, for asyncio."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from bench.event import SOURCE, TOPIC, TYPE, data
from bench.job import Job
from bench.looped import LoopedClient
from tars_mqtt import Envelope
from tars_mqtt.aio import MQTTClient

_MOST_QUEUED = 1_000


class Looped(LoopedClient):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._client = MQTTClient(f"mqtt://127.0.0.1:{job.port}", "bench", SOURCE, **job.settings)
        self.publish = self._client.publish_event

    async def connect(self, handle: Callable[[Any], None] | None = None) -> None:
        async def on_event(envelope: Envelope) -> None:
            assert handle is not None
            handle(envelope)

        for topic_filter in self.job.topic_filters:
            await self._client.subscribe(topic_filter, on_event, self.job.qos)
        await self._client.connect()

    async def publish_all(self) -> None:
        for number in range(self.job.messages):
            await self.publish(TOPIC, TYPE, data(number, self.note))

    async def publish_window(self) -> None:
        # What is under way at once is limited by the client itself.
        queued: deque[Awaitable[Any]] = deque()
        for number in range(self.job.messages):
            if len(queued) == _MOST_QUEUED:
                await queued.popleft()
            queued.append(self._client.submit_event(TOPIC, TYPE, data(number, self.note), qos=1))
        while queued:
            await queued.popleft()

    async def enqueue(self) -> list[Any]:
        job = self.job
        return [
            self._client.submit_event(TOPIC, TYPE, data(number, self.note), qos=1)
            for number in range(job.messages)
        ]

    async def leave(self) -> None:
        await self._client.shutdown()
