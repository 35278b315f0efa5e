"""aiomqtt: paho-mqtt behind asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiomqtt

from bench.event import decode, encode
from bench.job import Job
from bench.looped import LoopedClient
from bench.route import dispatcher

_FILTERS_AT_ONCE = 100


class Aiomqtt(LoopedClient):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._client: aiomqtt.Client
        self._reader: asyncio.Task[None]

    async def connect(self, handle: Callable[[Any], None] | None = None) -> None:
        # MQTT 3.1.1 is its default, and the faster one.
        self._client = aiomqtt.Client(
            "127.0.0.1", self.job.port, identifier="bench", max_inflight_messages=self.job.window
        )
        # Above this many it writes a warning for each message.
        self._client.pending_calls_threshold = self.job.messages
        await self._client.__aenter__()
        filters = self.job.topic_filters
        for start in range(0, len(filters), _FILTERS_AT_ONCE):
            await self._client.subscribe(
                [(name, self.job.qos) for name in filters[start : start + _FILTERS_AT_ONCE]]
            )
        if handle is not None:
            self._reader = asyncio.create_task(self._read(dispatcher(filters, handle)))

    async def _read(self, dispatch: Callable[[str, Any], None]) -> None:
        async for message in self._client.messages:
            dispatch(message.topic.value, decode(message.payload))

    async def publish(self, topic: str, event_type: str, event_data: dict[str, Any], *, qos: int = 0) -> None:
        await self._client.publish(topic, encode(event_type, event_data), qos)

    async def leave(self) -> None:
        await self._client.__aexit__(None, None, None)
