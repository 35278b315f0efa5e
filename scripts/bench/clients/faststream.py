"""FastStream, over zmqtt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from faststream.middlewares import AckPolicy
from faststream.mqtt import MQTTBroker, QoS

from bench.event import envelope
from bench.job import Job
from bench.looped import LoopedClient


class FastStream(LoopedClient):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # Without the log lines and the type casts that it adds to each message. JSON is its own business:
        # with orjson installed that is faster than what the others use.
        self._broker = MQTTBroker(
            f"mqtt://127.0.0.1:{job.port}",
            client_id="bench",
            version="3.1.1",
            logger=None,
            apply_types=False,
            ack_policy=AckPolicy.ACK_FIRST,
        )

    async def connect(self, handle: Callable[[Any], None] | None = None) -> None:
        async def on_event(event: dict[str, Any]) -> None:
            assert handle is not None
            handle(event)

        for topic_filter in self.job.topic_filters:
            self._broker.subscriber(topic_filter, qos=QoS(self.job.qos), no_reply=True)(on_event)
        await self._broker.start()

    async def publish(self, topic: str, event_type: str, event_data: dict[str, Any], *, qos: int = 0) -> None:
        event = envelope(event_type, event_data)
        await self._broker.publish(event, topic, qos=QoS(qos), correlation_id=event["id"])

    async def leave(self) -> None:
        await self._broker.stop()
