"""Sees what goes over a broker, through paho alone: a witness that shares no code with the package."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from tests.support.wait import eventually

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

PATIENCE = 10.0


class Seen(NamedTuple):
    """One message; *retain* is the flag that it was published with."""

    topic: str
    payload: bytes
    qos: int
    retain: bool

    @property
    def envelope(self) -> Any:
        """The payload as plain JSON."""
        return json.loads(self.payload)

    @property
    def data(self) -> Any:
        """The data of the envelope."""
        return self.envelope["data"]


class Observer:
    """Collects every message of a broker in `seen`, and publishes raw ones."""

    def __init__(self, host: str, port: int, topic_filter: str = "#") -> None:
        self.seen: list[Seen] = []
        self._subscribed = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_message = lambda _client, _data, message: self.seen.append(
            Seen(message.topic, bytes(message.payload), message.qos, message.retain)
        )
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.connect(host, port)
        self._client.loop_start()
        self._client.subscribe(topic_filter, options=SubscribeOptions(qos=2, retainAsPublished=True))
        assert self._subscribed.wait(PATIENCE), "the broker does not answer"

    def on(self, topic: str) -> list[Seen]:
        """What came on exactly this topic so far."""
        return [seen for seen in self.seen if seen.topic == topic]

    def wait_for(self, topic: str, count: int = 1) -> list[Seen]:
        """Wait until so many messages have come on *topic*, and return them."""
        eventually(
            lambda: len(self.on(topic)) >= count, message=lambda: f"{count} on {topic}, but {self.seen}"
        )
        return self.on(topic)

    def publish(self, topic: str, payload: bytes | dict[str, Any], *, retain: bool = False) -> None:
        """Publish with QoS 1 and return when the broker has it; a dict is written as JSON."""
        raw = json.dumps(payload).encode() if isinstance(payload, dict) else payload
        self._client.publish(topic, raw, qos=1, retain=retain).wait_for_publish(PATIENCE)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        # paho closes the last of its sockets when nobody refers to it any more.
        self._client.on_message = self._client.on_subscribe = None
        del self._client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
