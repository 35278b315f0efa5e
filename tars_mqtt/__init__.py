"""MQTT for services: connect from the environment, publish typed events, handle messages on worker threads.

    from tars_mqtt import MQTTClient

    with MQTTClient.from_env() as client:
        client.publish_event("greetings", "greeting.sent", {"message": "hello"}, qos=1)

The same client for asyncio is ``tars_mqtt.aio.MQTTClient``.
"""

from __future__ import annotations

from tars_mqtt._core.state import ConnectionState
from tars_mqtt._core.stats import Stats
from tars_mqtt.client import MQTTClient
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.context import EnvelopeLogFilter, current_message
from tars_mqtt.dedup import MessageDeduplicator
from tars_mqtt.envelope import Envelope
from tars_mqtt.errors import (
    AckTimeoutError,
    ClosedError,
    ConfigError,
    ConnectError,
    ConnectRefusedError,
    DecodeError,
    EncodeError,
    NotConnectedError,
    OutboxError,
    PublishError,
    PublishRejectedError,
    QueueFullError,
    SubscribeError,
    TarsMQTTError,
    TopicError,
)
from tars_mqtt.message import Message, PublishReceipt
from tars_mqtt.payload import HealthPayload, HeartbeatPayload
from tars_mqtt.subscription import MessageIterator, Subscription

__all__ = [
    "AckTimeoutError",
    "ClosedError",
    "ConfigError",
    "ConnectError",
    "ConnectRefusedError",
    "ConnectionState",
    "DecodeError",
    "EncodeError",
    "Envelope",
    "EnvelopeLogFilter",
    "HealthPayload",
    "HeartbeatPayload",
    "MQTTClient",
    "MQTTClientConfig",
    "Message",
    "MessageDeduplicator",
    "MessageIterator",
    "NotConnectedError",
    "OutboxError",
    "PublishError",
    "PublishReceipt",
    "PublishRejectedError",
    "QueueFullError",
    "Stats",
    "SubscribeError",
    "Subscription",
    "TarsMQTTError",
    "TopicError",
    "__version__",
    "current_message",
]


def __getattr__(name: str) -> str:
    # importlib.metadata takes longer to import than this package is allowed to.
    if name == "__version__":
        from importlib.metadata import version

        return version("tars-mqtt")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
