"""gmqtt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import gmqtt  # type: ignore[import-untyped]
from gmqtt.mqtt.constants import MQTTv311  # type: ignore[import-untyped]
from gmqtt.storage import PersistentStorage  # type: ignore[import-untyped]

from bench.event import TOPIC, TYPE, data, decode, encode
from bench.job import Job
from bench.looped import LoopedClient
from bench.route import dispatcher

_FILTERS_AT_ONCE = 100


class _Window(PersistentStorage):  # type: ignore[misc]
    """Knows how many messages are unacknowledged: gmqtt itself neither limits nor tells."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._room: asyncio.Future[None] | None = None

    def remove_message_by_mid(self, mid: int) -> None:
        super().remove_message_by_mid(mid)
        if self._room is not None and len(self._messages) < self._size:
            self._room.set_result(None)
            self._room = None

    async def room(self) -> None:
        if len(self._messages) >= self._size:
            self._room = asyncio.get_running_loop().create_future()
            await self._room


class Gmqtt(LoopedClient):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._window = _Window(job.window)
        self._client = gmqtt.Client("bench", persistent_storage=self._window)

    async def connect(self, handle: Callable[[Any], None] | None = None) -> None:
        job, filters = self.job, self.job.topic_filters
        subscribed = asyncio.Semaphore(0)
        self._client.on_subscribe = lambda *_: subscribed.release()
        if handle is not None:
            dispatch = dispatcher(filters, handle)

            # A plain function is faster than a coroutine function, of which it makes a task for each message.
            def on_message(client: Any, topic: str, payload: bytes, qos: int, properties: Any) -> int:
                dispatch(topic, decode(payload))
                return 0

            self._client.on_message = on_message
        await self._client.connect("127.0.0.1", job.port, version=MQTTv311)
        for start in range(0, len(filters), _FILTERS_AT_ONCE):
            names = filters[start : start + _FILTERS_AT_ONCE]
            self._client.subscribe([gmqtt.Subscription(name, job.qos) for name in names])
            await subscribed.acquire()

    def submit(self, topic: str, event_type: str, event_data: dict[str, Any], *, qos: int = 0) -> None:
        self._client.publish(topic, encode(event_type, event_data), qos)

    async def publish(self, topic: str, event_type: str, event_data: dict[str, Any], *, qos: int = 0) -> None:
        self._client.publish(topic, encode(event_type, event_data), qos)
        if qos:
            await self._window.wait_empty()

    async def publish_all(self) -> None:
        for number in range(self.job.messages):
            self.submit(TOPIC, TYPE, data(number, self.note))

    async def publish_window(self) -> None:
        for number in range(self.job.messages):
            await self._window.room()
            self.submit(TOPIC, TYPE, data(number, self.note), qos=1)
        await self._window.wait_empty()

    async def enqueue(self) -> list[Any]:
        for number in range(self.job.messages):
            self.submit(TOPIC, TYPE, data(number, self.note), qos=1)
        return [None] * self.job.messages

    async def leave(self) -> None:
        await self._client.disconnect()
