"""`MQTTClient` for threads and scripts: every call may block, none needs an event loop."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from tars_mqtt._core.engine import Engine
from tars_mqtt._core.handler import HandlerCall, is_coroutine_function
from tars_mqtt._core.option import HandlerOptions
from tars_mqtt._core.registry import Registration
from tars_mqtt._core.state import ConnectionState
from tars_mqtt._core.stats import Stats
from tars_mqtt._core.timeout import DEFAULT, Timeout, seconds
from tars_mqtt._core.workers import WorkerPool
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import ClosedError, ConfigError, SubscribeError
from tars_mqtt.message import PublishReceipt
from tars_mqtt.settings import Overrides, Settings
from tars_mqtt.subscription import MessageIterator, Subscription
from tars_mqtt.topics import check_filter

__all__ = ["MQTTClient"]

HandlerT = TypeVar("HandlerT", bound=Callable[..., Any])


class MQTTClient:
    """A service's connection to an MQTT broker.

    Reconnects for ever, restores its subscriptions, keeps outgoing QoS 1 and 2 messages until the
    broker has them, and acknowledges incoming ones after their handlers. A context manager:
    connects on enter, shuts down on exit.

    Args:
        mqtt_url: ``mqtt://[user[:password]@]host[:port]``.
        client_id: Unique at the broker; the same at each start, for the session to be found again.
        source_name: Names the service in envelopes and health topics; the client id unless given.
        settings: Any other field of `MQTTClientConfig`.

    Raises:
        ConfigError: One or more settings are wrong; it names them all.
        TypeError: There is no setting of that name; it says which was probably meant.

    Threads:
        Every method may be called from any thread, handlers included.
    """

    def __init__(
        self, mqtt_url: str, client_id: str, source_name: str | None = None, **settings: Unpack[Settings]
    ) -> None:
        self._start_up(MQTTClientConfig(mqtt_url, client_id, source_name, **settings))

    @classmethod
    def from_env(cls, prefix: str = "MQTT_", **overrides: Unpack[Overrides]) -> Self:
        """Make a client from environment variables; *overrides* win over them.

        Raises:
            ConfigError: One or more settings are wrong; it names them all, with their variables.
        """
        return cls.from_config(MQTTClientConfig.from_env(prefix, **overrides))

    @classmethod
    def from_config(cls, config: MQTTClientConfig) -> Self:
        """Make a client from checked settings."""
        client = cls.__new__(cls)
        client._start_up(config)
        return client

    def _start_up(self, config: MQTTClientConfig) -> None:
        for name in ("credentials", "ws_headers"):
            function = getattr(config, name)
            if callable(function) and is_coroutine_function(function):
                raise ConfigError(
                    [f"{name} is a coroutine function: use tars_mqtt.aio.MQTTClient, or a plain function"]
                )
        self._engine = Engine(config, WorkerPool)
        self._stop: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        """Tells `run` that it is to end, and in which time."""

    def __repr__(self) -> str:
        return f"<MQTTClient {self.config.client_id!r} at {self.config.urls[0]}, {self.state.value}>"

    # -- connection -------------------------------------------------------------------------

    def connect(self, timeout: Timeout = DEFAULT) -> None:
        """Connect and return when every registered subscription is acknowledged.

        Retries until the time is up. From then on the connection is restored whenever it breaks.

        Args:
            timeout: Seconds; ``connect_timeout`` unless given, ``None`` waits for ever.

        Raises:
            ConnectRefusedError: The broker said no for good: wrong password, not authorised, bad client id.
            ConnectError: No connection came about in time, or one side does not trust the other's certificate,
                which waiting cannot cure; nothing is left running.
            ConfigError: A file that a setting names cannot be used: a certificate, a key, a password.
            OutboxError: Another process has the outbox, or its file cannot be used.
            ClosedError: The client is being shut down, or left the broker meanwhile.
            SubscribeError: The broker refused some of the subscriptions. The client is connected.
        """
        self._engine.life.connect(seconds(timeout, self.config.connect_timeout))

    def disconnect(self) -> None:
        """Leave the broker; `connect` may follow.

        Subscriptions stay registered, messages of QoS 1 and 2 that were not sent stay queued. Takes no
        longer than ``shutdown_timeout``, whatever state the broker is in.
        """
        self._engine.life.disconnect()

    def shutdown(self, timeout: Timeout = DEFAULT) -> None:
        """Finish the handlers, flush QoS 1 and 2, say goodbye, join every thread.

        Keeps to its time, whatever state the broker is in. What could not be flushed is counted
        and logged, its receipts fail with `ClosedError`. Idempotent; `connect` may follow. In a handler it
        returns at once, and waits for that handler on a thread of its own.

        Args:
            timeout: Seconds; ``shutdown_timeout`` unless given.
        """
        self._shut_down(seconds(timeout, self.config.shutdown_timeout), None)

    def _shut_down(self, limit: float | None, life: int | None) -> None:
        """Shut down; with *life*, only that of the `Life.lives`."""
        if self._engine.dispatcher.in_handler():
            self._engine.life.shutdown_aside(limit)
            self._stop.put(limit)  # not before: `run` shuts down, too
        else:
            self._stop.put(limit)
            self._engine.life.shutdown(limit, threading.current_thread(), life)

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.shutdown()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._engine.life.forked:  # a child that leaves the block has nothing to end here
            return
        life = self._engine.life.asked_to_end()  # whoever connects when that has ended, goes on
        try:
            self._engine.life.await_aside(lambda: exc is not None)
        finally:
            self._shut_down(self.config.shutdown_timeout, life)

    def run(self, timeout: Timeout = DEFAULT) -> None:
        """Connect if needed, serve until SIGINT or SIGTERM, then shut down.

        On a thread other than the main one, where Python delivers no signals, until `shutdown`.

        Args:
            timeout: Seconds for the first connection, as in `connect`, whose errors it raises; ``None`` waits
                for a broker that is not there yet.
        """
        # Not an Event: the signal may come while this very thread holds the lock inside.
        stop: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self._stop = stop
        signals: list[None] = []

        def end() -> None:
            signals.append(None)
            stop.put(self.config.shutdown_timeout)
            self._engine.life.call_off()

        life = None
        limit: float | None = self.config.shutdown_timeout
        with _on_signals(end, self._engine.life.forget_signals):
            try:
                # Whoever connects when that has ended, goes on.
                life = self._engine.life.connect(seconds(timeout, self.config.connect_timeout))
                while True:
                    # On Windows an untimed wait cannot be interrupted by a signal.
                    with contextlib.suppress(queue.Empty):
                        limit = stop.get(timeout=1.0)
                        break
            except ClosedError:
                if stop.empty():
                    raise
                limit = stop.get()
            finally:
                try:
                    self._engine.life.await_aside(lambda: bool(signals))
                finally:
                    self._shut_down(limit, life)

    def wait_connected(self, timeout: float | None = None) -> bool:
        """Wait for the connection; False when the time ran out first, or the client is shut down.

        Args:
            timeout: Seconds; ``None`` waits for ever, ``0`` does not wait.
        """
        self._engine.life.check()
        ends = (ConnectionState.CONNECTED, ConnectionState.CLOSED)
        self._engine.state.wait(lambda state: state in ends, seconds(timeout, 0.0))
        return self.connected

    @property
    def connected(self) -> bool:
        """Whether the connection is up and the subscriptions acknowledged."""
        return self.state is ConnectionState.CONNECTED

    @property
    def state(self) -> ConnectionState:
        """Where the client stands."""
        return self._engine.state.value

    @property
    def config(self) -> MQTTClientConfig:
        """The settings."""
        return self._engine.config

    @property
    def client(self) -> Any:
        """The underlying paho-mqtt client, for what is not wrapped here.

        Its ``publish``, ``subscribe`` and message callbacks work beside ours; ``on_message`` gets
        what none of our subscriptions matches. Leave its ``on_connect``, ``on_disconnect``,
        ``on_subscribe``, ``on_unsubscribe`` and ``on_socket_*`` alone, and its loop functions.
        The object may change with a `connect`, when the broker speaks another version of MQTT.
        """
        return self._engine.client

    def stats(self) -> Stats:
        """A snapshot of the client's counters."""
        return self._engine.stats()

    # -- publishing -------------------------------------------------------------------------

    def publish_event(
        self,
        topic: str,
        event_type: str,
        data: Any,
        *,
        correlation_id: str | None = None,
        qos: int = 0,
        retain: bool = False,
        properties: Mapping[str, object] | None = None,
        timeout: Timeout = DEFAULT,
    ) -> str:
        """Publish *data* in an `Envelope` and return its id.

        QoS 0 returns when the message is handed to the network: it arrives at most once. QoS 1 and 2
        return when the broker has acknowledged it: at least once, exactly once [MQTT-4.3]. They leave in
        the order of the calls, also across reconnects; during an outage they wait in the queue.

        Args:
            topic: Where it goes. No wildcards.
            event_type: What happened, ``user.login`` for instance.
            data: JSON-like data, an attrs, dataclass or pydantic object.
            qos: 0, 1 or 2.
            retain: Whether the broker keeps it for those who subscribe later.
            correlation_id: Links a response to its request.
            properties: Of MQTT 5, by the names that `Message.properties` has: ``message_expiry_interval`` in whole
                seconds, ``content_type``, ``user_properties`` as a mapping or as pairs of str,
                ``response_topic``, ``correlation_data`` as bytes, ``payload_format_indicator`` 0 or 1. MQTT 3.1.1
                has none: there they are left out, with a warning. The time that a message waits here is taken
                off its expiry interval; it is not sent once that is over.
            timeout: Seconds for room in the queue and the acknowledgement together;
                ``publish_timeout`` unless given, ``None`` waits for ever.

        Raises:
            TopicError, EncodeError: The input is wrong; nothing was sent.
            NotConnectedError: QoS 0 during an outage, or `connect` was not called.
            QueueFullError, OutboxError: No room came free in time, or the disk failed; the message was not taken.
            AckTimeoutError: No acknowledgement in time; the message is still on its way.
            PublishRejectedError: The broker refused it, no packet that it takes can carry it, or its time was over.
            ClosedError: The client was shut down.
        """
        limit = seconds(timeout, self.config.publish_timeout)
        started = time.monotonic() if qos else 0.0
        receipt = self._engine.submit_event(
            topic, event_type, data, correlation_id, qos, retain, limit, properties
        )
        if qos:
            receipt.result(_rest(limit, started))
        return receipt.envelope_id or ""

    def submit_event(
        self,
        topic: str,
        event_type: str,
        data: Any,
        *,
        correlation_id: str | None = None,
        qos: int = 0,
        retain: bool = False,
        properties: Mapping[str, object] | None = None,
        timeout: Timeout = DEFAULT,
    ) -> PublishReceipt:
        """Publish like `publish_event`, without waiting for the broker.

        Args:
            timeout: Seconds to wait for room in the queue; ``publish_timeout`` unless given,
                ``None`` waits for ever, ``0`` not at all.

        Returns:
            The receipt: done when the broker has acknowledged, for QoS 0 at once.

        Raises:
            TopicError, EncodeError, NotConnectedError, QueueFullError, OutboxError, ClosedError: As `publish_event`.
        """
        return self._engine.submit_event(
            topic,
            event_type,
            data,
            correlation_id,
            qos,
            retain,
            seconds(timeout, self.config.publish_timeout),
            properties,
        )

    def publish(
        self,
        topic: str,
        payload: bytes | str,
        *,
        qos: int = 0,
        retain: bool = False,
        properties: Mapping[str, object] | None = None,
        timeout: Timeout = DEFAULT,
    ) -> None:
        """Publish raw bytes, or text as UTF-8, without an envelope.

        Waits as `publish_event`, and raises the same; `TypeError` for another payload.
        """
        limit = seconds(timeout, self.config.publish_timeout)
        started = time.monotonic()
        receipt = self._engine.submit(topic, payload, qos, retain, limit, properties)
        receipt.result(_rest(limit, started))

    def submit(
        self,
        topic: str,
        payload: bytes | str,
        *,
        qos: int = 0,
        retain: bool = False,
        properties: Mapping[str, object] | None = None,
        timeout: Timeout = DEFAULT,
    ) -> PublishReceipt:
        """Publish like `publish`, without waiting for the broker: as `submit_event`, without an envelope."""
        limit = seconds(timeout, self.config.publish_timeout)
        return self._engine.submit(topic, payload, qos, retain, limit, properties)

    def publish_health(self, ok: bool, event: str | None = None, error: str | None = None) -> None:
        """Publish the service's own health: retained, QoS 1, on ``system/health/{source_name}``.

        Does nothing without ``enable_health``, and says so once as a warning. In no outbox: of the next process
        it would say nothing.

        Raises:
            NotConnectedError, QueueFullError, AckTimeoutError, PublishRejectedError, ClosedError: As `publish_event`.
        """
        limit, started = self.config.publish_timeout, time.monotonic()
        receipt = self._engine.health.publish(ok, event, error, limit)
        if receipt is not None:
            receipt.result(_rest(limit, started))

    # -- subscribing ------------------------------------------------------------------------

    def subscribe(
        self,
        topic: str,
        handler: Callable[[Any], Any],
        qos: int = 0,
        *,
        timeout: Timeout = DEFAULT,
        **options: Unpack[HandlerOptions],
    ) -> Subscription:
        """Have *handler* called with each message that matches.

        What the handler gets follows from its first parameter's annotation: ``bytes`` or none, the
        payload; `Message`; `Envelope`; or an attrs, dataclass or pydantic class, the envelope's
        data as that. One subscription's messages are handled in order, one at a time, on a worker
        thread. QoS 1 and 2 are acknowledged after the handler.

        Before `connect`, and during an outage, the subscription is registered and made later.

        Args:
            topic: A filter: ``+`` and ``#`` as in the standard [MQTT-4.7.1], ``$share/group/filter`` too
                [MQTT-4.8.2].
            handler: A plain function. What it raises is logged and counted.
            qos: The highest QoS with which the broker delivers.
            timeout: Seconds to wait for the broker's word; ``connect_timeout`` unless given.
            options: *concurrency*: how many messages may be in work at once; 1 unless given, with
                *order_by* as many as there are workers. *order_by*: ``"topic"``, or a quick function
                of the `Message` (it runs on the network thread): order is kept for each key, different
                keys go side by side. *retries* (0): how often a message whose handler raised is tried
                again before the next one of its lane. *retry_on*: which failures that is for, as a class of
                exceptions, a tuple of them, or a function of one; a time-out counts as a ``TimeoutError``.
                *retry_delay* (0.5 s): before the first retry;
                doubled for each further one, with jitter. *dead_letter*: a topic such as
                ``"dead/{topic}"`` that gets an envelope with each message which no attempt could
                handle. *handler_timeout*: seconds after which a handler that does not return counts
                as failed; the setting of that name unless given.

        Raises:
            TopicError: The filter, or the topic for dead letters, is malformed.
            TypeError: The handler is a coroutine function, or asks for what cannot be given.
            ValueError: An option is out of range.
            SubscribeError: The broker refused, or did not answer in time; nothing stays registered.
        """
        if is_coroutine_function(handler):
            raise TypeError(
                f"{handler!r} is a coroutine function: use tars_mqtt.aio.MQTTClient, or a plain function"
            )
        limit = seconds(timeout, self.config.connect_timeout)
        registration = self._engine.register(topic, qos, HandlerCall, handler, options)
        return self._subscribed(registration, limit)

    def _subscribed(self, registration: Registration, limit: float | None) -> Subscription:
        engine = self._engine
        try:
            engine.subscribe(registration).result(limit)
        except (TimeoutError, SubscribeError) as error:
            raise engine.not_subscribed(registration, error, limit) from None
        except BaseException:  # Ctrl-C
            engine.unregister(registration)
            raise
        return Subscription(engine, registration)

    def on(
        self, topic: str, qos: int = 0, *, timeout: Timeout = DEFAULT, **options: Unpack[HandlerOptions]
    ) -> Callable[[HandlerT], HandlerT]:
        """Decorator form of `subscribe`; usable before `connect`."""
        check_filter(topic)  # ``@client.on`` without a filter would register nothing

        def decorate(handler: HandlerT) -> HandlerT:
            self.subscribe(topic, handler, qos, timeout=timeout, **options)
            return handler

        return decorate

    def messages(self, topic: str, qos: int = 0) -> MessageIterator:
        """Subscribe, and iterate over the messages.

        The buffer is bounded by ``max_pending``, as for handlers. A message of QoS 1 or 2 is
        acknowledged when the next one is asked for. The iteration ends with `MessageIterator.close`
        and with `shutdown`; an iterator that nobody refers to any more is closed.

        Raises:
            TopicError, SubscribeError: As `subscribe`.
        """
        registration = self._engine.register(topic, qos, None, None, {})
        subscription = self._subscribed(registration, self.config.connect_timeout)
        return MessageIterator(self._engine, subscription, registration)


def _rest(limit: float | None, started: float) -> float | None:
    return None if limit is None else max(0.0, limit - (time.monotonic() - started))


@contextlib.contextmanager
def _on_signals(action: Callable[[], None], over: Callable[[], None]) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM call *action*, but on the main thread only; *over* when none will any more."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: action())
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None is one that was not installed from Python
                signal.signal(number, handler)
        over()
