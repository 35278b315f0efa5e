"""This package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.event import SOURCE
from bench.job import Job
from bench.threaded import ThreadedClient
from tars_mqtt import Envelope, MQTTClient


class Threaded(ThreadedClient):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._client = MQTTClient(f"mqtt://127.0.0.1:{job.port}", "bench", SOURCE, **job.settings)
        self.publish = self._client.publish_event
        self.submit = self._client.submit_event

    def connect(self, handle: Callable[[Any], None] | None = None) -> None:
        def on_event(envelope: Envelope) -> None:
            assert handle is not None
            handle(envelope)

        for topic_filter in self.job.topic_filters:
            self._client.subscribe(topic_filter, on_event, self.job.qos)
        self._client.connect()

    def wait(self, receipt: Any) -> None:
        receipt.result()

    def leave(self) -> None:
        self._client.shutdown()
