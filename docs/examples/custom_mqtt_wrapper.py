"""Three ways to build on MQTTClient, by composition: a domain wrapper, batching, direct access to paho.

    python docs/examples/custom_mqtt_wrapper.py

shows each at work, with the broker at MQTT_URL, or else at localhost. Pattern 1 comes in both colours, which
differ in nothing but ``await``; patterns 2 and 3 are for asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, Self

import attrs
from paho.mqtt.client import topic_matches_sub

from tars_mqtt import Message, MQTTClient, QueueFullError, aio

MQTT_URL = os.environ.get("MQTT_URL") or "mqtt://localhost:1883"


# -- pattern 1: a domain wrapper -----------------------------------------------------------------------


@attrs.frozen
class Transcription:
    """What was said."""

    text: str
    confidence: float
    lang: str = "en"
    is_final: bool = True


class SpeechClient:
    """Speaks of transcriptions; that they are events on a topic is nobody else's business."""

    def __init__(self, mqtt_url: str, client_id: str) -> None:
        self._client = MQTTClient(mqtt_url, client_id)

    def publish_final_transcription(self, text: str, confidence: float) -> str:
        """Publish a transcription, and return its id when the broker has it."""
        return self._client.publish_event("stt/final", "stt.final", Transcription(text, confidence), qos=1)

    def on_final_transcription(self, handler: Callable[[Transcription], None]) -> None:
        """Call *handler* with each transcription; usable before the client is connected."""

        def handle(transcription: Transcription) -> None:
            handler(transcription)

        self._client.subscribe("stt/final", handle, qos=1)

    def __enter__(self) -> Self:
        self._client.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.shutdown()


class AsyncSpeechClient:
    """The same for asyncio."""

    def __init__(self, mqtt_url: str, client_id: str) -> None:
        self._client = aio.MQTTClient(mqtt_url, client_id)

    async def publish_final_transcription(self, text: str, confidence: float) -> str:
        """Publish a transcription, and return its id when the broker has it."""
        return await self._client.publish_event(
            "stt/final", "stt.final", Transcription(text, confidence), qos=1
        )

    async def on_final_transcription(self, handler: Callable[[Transcription], Awaitable[None]]) -> None:
        """Call *handler* with each transcription; usable before the client is connected."""

        async def handle(transcription: Transcription) -> None:
            await handler(transcription)

        await self._client.subscribe("stt/final", handle, qos=1)

    async def __aenter__(self) -> Self:
        await self._client.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.shutdown()


# -- pattern 2: batching -------------------------------------------------------------------------------


class BatchingClient:
    """Publishes items in batches: when one is full, and at intervals whatever there is.

    Nothing that `publish_batched` has taken is lost while the process lives: batches go out with QoS 1, wait
    in the client's queue during an outage, and `shutdown` flushes what is left.
    """

    def __init__(
        self, mqtt_url: str, client_id: str, *, batch_size: int = 10, batch_interval: float = 1.0
    ) -> None:
        self._client = aio.MQTTClient(mqtt_url, client_id)
        self._batch_size = batch_size
        self._batch_interval = batch_interval
        self._batches: defaultdict[str, list[Any]] = defaultdict(list)
        self._flushing: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Connect, and begin to flush at intervals."""
        await self._client.connect()
        self._flushing = asyncio.create_task(self._flush_at_intervals())

    async def publish_batched(self, topic: str, item: Any) -> None:
        """Add an item to the batch for *topic*; wait for the broker to have it if that made it full."""
        self._batches[topic].append(item)
        if len(self._batches[topic]) >= self._batch_size:
            await self._submit(topic)

    async def shutdown(self) -> None:
        """Publish what is left, and shut down. The client's own shutdown waits for the acknowledgements."""
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.wait([self._flushing])
        try:
            self._submit_all()
        finally:
            await self._client.shutdown()

    async def _flush_at_intervals(self) -> None:
        while True:
            await asyncio.sleep(self._batch_interval)
            with contextlib.suppress(QueueFullError):  # what was not taken stays, and goes next time
                self._submit_all()

    def _submit_all(self) -> None:
        for topic in tuple(self._batches):
            self._submit(topic)

    def _submit(self, topic: str) -> aio.PublishReceipt:
        items = self._batches[topic]
        data = {"items": items, "count": len(items)}
        receipt = self._client.submit_event(f"{topic}/batch", "items.batched", data, qos=1)
        del self._batches[topic]  # not before: a full queue has refused them
        return receipt


# -- pattern 3: direct access --------------------------------------------------------------------------


class FilteringClient:
    """Looks at messages before it handles them, through the client's own face of paho."""

    def __init__(self, mqtt_url: str, client_id: str) -> None:
        self._client = aio.MQTTClient(mqtt_url, client_id)
        self._filtering: set[asyncio.Task[None]] = set()

    async def connect(self) -> None:
        """Connect."""
        await self._client.connect()

    async def subscribe_with_filter(
        self,
        topic: str,
        wanted: Callable[[Message], bool],
        handler: Callable[[bytes], Awaitable[None]],
    ) -> None:
        """Call *handler* with the payload of each message that is *wanted*."""
        underlying = self._client.client
        await underlying.subscribe(topic)

        async def dispatch() -> None:
            async with underlying.messages() as messages:
                async for message in messages:
                    if topic_matches_sub(topic, message.topic) and wanted(
                        message
                    ):  # not what others asked for
                        await handler(message.payload)

        self._filtering.add(asyncio.create_task(dispatch()))

    async def shutdown(self) -> None:
        """End the loops, and shut down."""
        for task in self._filtering:
            task.cancel()
        await asyncio.gather(*self._filtering, return_exceptions=True)
        await self._client.shutdown()


# -- all of it at work ---------------------------------------------------------------------------------


def show_domain_wrapper() -> None:
    """Pattern 1 on threads."""
    heard = threading.Event()

    def listen(said: Transcription) -> None:
        print(f"heard on a thread: {said.text} ({said.confidence:.0%})")
        heard.set()

    with SpeechClient(MQTT_URL, "speech") as speech:
        speech.on_final_transcription(listen)
        speech.publish_final_transcription("hello world", 0.95)
        heard.wait(10)


async def show_async_domain_wrapper() -> None:
    """Pattern 1 on a loop."""
    heard = asyncio.Event()

    async def listen(said: Transcription) -> None:
        print(f"heard on the loop: {said.text} ({said.confidence:.0%})")
        heard.set()

    async with AsyncSpeechClient(MQTT_URL, "speech") as speech:
        await speech.on_final_transcription(listen)
        await speech.publish_final_transcription("good bye", 0.9)
        await asyncio.wait_for(heard.wait(), 10)


async def show_batching() -> None:
    """Pattern 2: 25 readings leave as batches of 10, 10, and what is left."""
    async with (
        aio.MQTTClient(MQTT_URL, "batch-reader") as reader,
        reader.messages("sensors/temperature/batch", qos=1) as batches,
    ):
        batching = BatchingClient(MQTT_URL, "sensors", batch_size=10, batch_interval=60)
        await batching.connect()
        for number in range(25):
            await batching.publish_batched("sensors/temperature", {"celsius": 20 + number / 10})
        await batching.shutdown()
        counts = []
        async for message in batches:
            counts.append(message.envelope.data["count"])
            if sum(counts) == 25:
                break
        print(f"batches of {counts}")


async def show_direct_access() -> None:
    """Pattern 3: of what comes on ``sensors/#``, the temperatures only."""
    arrived = asyncio.Event()

    async def handle(payload: bytes) -> None:
        print(f"filtered: {payload.decode()}")
        arrived.set()

    filtering = FilteringClient(MQTT_URL, "filter")
    await filtering.connect()
    await filtering.subscribe_with_filter("sensors/#", lambda message: "temperature" in message.topic, handle)
    async with aio.MQTTClient(MQTT_URL, "sensors") as sensors:
        await sensors.publish("sensors/kitchen/humidity", "60", qos=1)
        await sensors.publish("sensors/kitchen/temperature", "21.5", qos=1)
    await asyncio.wait_for(arrived.wait(), 10)
    await filtering.shutdown()


async def show_the_others() -> None:
    await show_async_domain_wrapper()
    await show_batching()
    await show_direct_access()


def main() -> None:
    show_domain_wrapper()
    asyncio.run(show_the_others())


if __name__ == "__main__":
    main()
