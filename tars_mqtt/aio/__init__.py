"""The same client for asyncio: ``from tars_mqtt.aio import MQTTClient``, and ``await`` what blocks there."""

from __future__ import annotations

from tars_mqtt import (
    AckTimeoutError,
    ClosedError,
    ConfigError,
    ConnectError,
    ConnectionState,
    ConnectRefusedError,
    DecodeError,
    EncodeError,
    Envelope,
    EnvelopeLogFilter,
    HealthPayload,
    HeartbeatPayload,
    Message,
    MessageDeduplicator,
    MQTTClientConfig,
    NotConnectedError,
    OutboxError,
    PublishError,
    PublishRejectedError,
    QueueFullError,
    Stats,
    SubscribeError,
    TarsMQTTError,
    TopicError,
    current_message,
)
from tars_mqtt.aio.client import MQTTClient
from tars_mqtt.aio.receipt import PublishReceipt
from tars_mqtt.aio.subscription import MessageIterator, Subscription

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
    if name == "__version__":
        from tars_mqtt import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
