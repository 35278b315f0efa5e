"""paho-mqtt, with its network thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from bench.event import decode, encode
from bench.job import Job
from bench.threaded import ThreadedClient

_FILTERS_AT_ONCE = 100


class Paho(ThreadedClient):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        # MQTT 3.1.1: in MQTT 5 it makes an object of the properties of every packet.
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, "bench", protocol=mqtt.MQTTv311)
        self._client.max_inflight_messages_set(job.window)

    def connect(self, handle: Callable[[Any], None] | None = None) -> None:
        client, filters = self._client, self.job.topic_filters
        connected, subscribed = threading.Event(), threading.Semaphore(0)
        client.on_connect = lambda *_: connected.set()
        client.on_subscribe = lambda *_: subscribed.release()

        def on_message(client: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
            assert handle is not None
            handle(decode(message.payload))

        client.connect("127.0.0.1", self.job.port)
        client.loop_start()
        connected.wait()
        for topic_filter in filters:
            client.message_callback_add(topic_filter, on_message)
        for start in range(0, len(filters), _FILTERS_AT_ONCE):
            client.subscribe([(name, self.job.qos) for name in filters[start : start + _FILTERS_AT_ONCE]])
            subscribed.acquire()

    def publish(self, topic: str, event_type: str, event_data: dict[str, Any], *, qos: int = 0) -> None:
        info = self._client.publish(topic, encode(event_type, event_data), qos)
        if qos:
            info.wait_for_publish()

    def submit(self, topic: str, event_type: str, event_data: dict[str, Any], *, qos: int = 0) -> Any:
        return self._client.publish(topic, encode(event_type, event_data), qos)

    def wait(self, receipt: Any) -> None:
        receipt.wait_for_publish()

    def leave(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
