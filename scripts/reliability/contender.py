"""The clients, behind one blocking face: ours in both colours, paho-mqtt and aiomqtt as their users use them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import aiomqtt
import attrs
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from tars_mqtt import Envelope, QueueFullError
from tests.support.colour import BlockingClient, ClientMaker, LoopThread
from tests.support.port import address_of

EVENT_TYPE = "soak.event"
OURS = ("threads", "asyncio")
OTHERS = ("paho", "aiomqtt")
NAMES = (*OURS, *OTHERS)

Handler = Callable[[bytes], object]


@attrs.frozen(kw_only=True)
class Settings:
    """What each of them has, under whatever name. *ours* goes to ours only."""

    keepalive: int = 60
    min_delay: float = 0.2
    max_delay: float = 0.5
    window: int = 20
    ours: dict[str, Any] = attrs.field(factory=dict)


class Receipt(Protocol):
    def result(self, timeout: float) -> object:
        """Return when the broker has it; raises `TimeoutError` if it has not in time."""


class Client(Protocol):
    """One client. `subscribe` before `connect`."""

    @property
    def connections(self) -> int:
        """How many have been established."""

    @property
    def queued(self) -> int:
        """Messages accepted and not acknowledged, as far as it tells."""

    def subscribe(self, topic_filter: str, handler: Handler) -> None: ...
    def connect(self) -> None: ...
    def submit(self, topic: str, data: Any) -> Receipt:
        """Publish an event with QoS 1, without waiting for the broker; raises `QueueFullError`."""

    def submit_all(self, topic: str, events: Iterable[Any]) -> int:
        """Submit them as fast as a program of its kind does; how many were not refused."""

    def close(self, timeout: float = 10.0) -> None: ...


def make(name: str, url: str, client_id: str, settings: Settings) -> Client:
    makers: dict[str, Callable[[], Client]] = {
        "threads": lambda: Ours("sync", url, client_id, settings),
        "asyncio": lambda: Ours("aio", url, client_id, settings),
        "paho": lambda: Paho(url, client_id, settings),
        "aiomqtt": lambda: Aiomqtt(url, client_id, settings),
    }
    return makers[name]()


class Ours:
    """This package."""

    def __init__(self, colour: Any, url: str, client_id: str, settings: Settings) -> None:
        self._maker = ClientMaker(colour)
        self.client = self._maker(
            url,
            client_id,
            keepalive=settings.keepalive,
            reconnect_min_delay=settings.min_delay,
            reconnect_max_delay=settings.max_delay,
            max_inflight=settings.window,
            **settings.ours,
        )

    @property
    def connections(self) -> int:
        return self.client.stats().connections  # type: ignore[no-any-return]

    @property
    def queued(self) -> int:
        return self.client.stats().queued  # type: ignore[no-any-return]

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        self.client.subscribe(topic_filter, handler, 1)

    def connect(self) -> None:
        self.client.connect()

    def submit(self, topic: str, data: Any) -> Receipt:
        receipt: Receipt = self.client.submit_event(topic, EVENT_TYPE, data, qos=1, timeout=0)
        return receipt

    def submit_all(self, topic: str, events: Iterable[Any]) -> int:
        return len(self.receipts_of(topic, events))

    def receipts_of(self, topic: str, events: Iterable[Any]) -> list[Any]:
        """The receipts of those that were not refused."""
        client = self.client.unwrapped if isinstance(self.client, BlockingClient) else self.client
        receipts = []

        def submit_all() -> None:
            for event in events:
                with contextlib.suppress(QueueFullError):
                    receipts.append(client.submit_event(topic, EVENT_TYPE, event, qos=1, timeout=0))

        if client is self.client:
            submit_all()
        else:
            self.on_loop(submit_all)
        return receipts

    def on_loop(self, function: Callable[..., Any]) -> Any:
        """Call *function* on the event loop of the client, and await what it returns."""
        return self.client._loop.call(function)

    def close(self, timeout: float = 10.0) -> None:
        self.client.shutdown(timeout)
        self._maker.close()


class _Acknowledgement:
    """As small as can be: it is measured with the rest."""

    __slots__ = ("_there",)

    def __init__(self) -> None:
        self._there = False

    def set(self) -> None:
        self._there = True

    def result(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self._there:
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.001)


class Paho:
    """paho-mqtt with its own thread, subscribing again on each connection, as its manual has it."""

    def __init__(self, url: str, client_id: str, settings: Settings) -> None:
        self._address = address_of(url)
        self._settings = settings
        self._handlers: list[tuple[str, Handler]] = []
        self._receipts: dict[int, _Acknowledgement] = {}
        self._subscribed = threading.Event()
        self.connections = 0
        self.client = client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id, clean_session=False, protocol=MQTTProtocolVersion.MQTTv311
        )
        client.reconnect_delay_set(settings.min_delay, settings.max_delay)  # type: ignore[arg-type]
        client.max_inflight_messages_set(settings.window)
        client.on_connect = self._on_connect
        client.on_subscribe = lambda *_: self._subscribed.set()
        client.on_publish = lambda _client, _data, mid, *_: self._acknowledged(mid)
        client.on_message = self._on_message

    @property
    def queued(self) -> int:
        return len(self.client._out_messages)

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        self._handlers.append((topic_filter, handler))

    def connect(self) -> None:
        self.client.connect(*self._address, keepalive=self._settings.keepalive)
        self.client.loop_start()
        assert self._subscribed.wait(10), "the broker does not answer"

    def _on_connect(self, client: mqtt.Client, *_: object) -> None:
        self.connections += 1
        if self._handlers:
            client.subscribe([(name, 1) for name, _ in self._handlers])
        else:
            self._subscribed.set()

    def _on_message(self, _client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        for topic_filter, handler in self._handlers:
            if mqtt.topic_matches_sub(topic_filter, message.topic):
                handler(message.payload)

    def submit(self, topic: str, data: Any) -> Receipt:
        payload = Envelope.new(EVENT_TYPE, data, source="soak").to_bytes()
        info = self.client.publish(topic, payload, 1)
        if info.rc == mqtt.MQTT_ERR_QUEUE_SIZE:
            raise QueueFullError("paho's queue is full")
        return self._receipt(info.mid)

    def submit_all(self, topic: str, events: Iterable[Any]) -> int:
        count = 0
        for event in events:
            with contextlib.suppress(QueueFullError):
                self.submit(topic, event)
                count += 1
        return count

    def _acknowledged(self, mid: int) -> None:
        self._receipt(mid).set()

    def _receipt(self, mid: int) -> _Acknowledgement:
        """The same one for the publish and for its acknowledgement, whichever comes first."""
        receipt = self._receipts.pop(mid, None)
        if receipt is None:
            receipt = self._receipts[mid] = _Acknowledgement()
        return receipt

    def close(self, timeout: float = 10.0) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Aiomqtt:
    """aiomqtt with the loop for reconnecting that its manual has, and a task for each publish that tries again."""

    def __init__(self, url: str, client_id: str, settings: Settings) -> None:
        self._host, self._port = address_of(url)
        self._client_id = client_id
        self._settings = settings
        self._handlers: list[tuple[str, Handler]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = LoopThread()
        self._connected: asyncio.Event
        self._client: aiomqtt.Client
        self._life: asyncio.Task[None]
        self.connections = 0

    @property
    def queued(self) -> int:
        return len(self._tasks)

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        self._handlers.append((topic_filter, handler))

    def connect(self) -> None:
        async def start() -> None:
            self._connected = asyncio.Event()
            self._life = asyncio.get_running_loop().create_task(self._live())
            await asyncio.wait_for(self._connected.wait(), 10)

        self._loop.call(start)

    async def _live(self) -> None:
        while True:
            with contextlib.suppress(aiomqtt.MqttError):
                async with aiomqtt.Client(
                    self._host,
                    self._port,
                    identifier=self._client_id,
                    clean_session=False,
                    keepalive=self._settings.keepalive,
                    max_inflight_messages=self._settings.window,
                ) as client:
                    client.pending_calls_threshold = 1_000_000
                    self.connections += 1
                    for topic_filter, _ in self._handlers:
                        await client.subscribe(topic_filter, 1)
                    self._client = client
                    self._connected.set()
                    await self._read(client)
            self._connected.clear()
            await asyncio.sleep(self._settings.min_delay)

    async def _read(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            for topic_filter, handler in self._handlers:
                if message.topic.matches(topic_filter):
                    with contextlib.suppress(Exception):
                        handler(bytes(message.payload))  # type: ignore[arg-type]

    def submit(self, topic: str, data: Any) -> Receipt:
        return self._loop.call(self._start, topic, data)  # type: ignore[no-any-return]

    def submit_all(self, topic: str, events: Iterable[Any]) -> int:
        return self._loop.call(lambda: sum(self._start(topic, event) is not None for event in events))  # type: ignore[no-any-return]

    def _start(self, topic: str, data: Any) -> _Acknowledgement:
        payload = Envelope.new(EVENT_TYPE, data, source="soak").to_bytes()
        receipt = _Acknowledgement()
        task = asyncio.get_running_loop().create_task(self._publish(topic, payload, receipt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return receipt

    async def _publish(self, topic: str, payload: bytes, receipt: _Acknowledgement) -> None:
        while True:
            await self._connected.wait()
            try:
                await self._client.publish(topic, payload, 1)
            except aiomqtt.MqttError:
                await asyncio.sleep(0.05)
            else:
                receipt.set()
                return

    def close(self, timeout: float = 10.0) -> None:
        async def end() -> None:
            # The end of its ``async with``; publishes that nobody waited for end with the loop.
            self._life.cancel()
            await asyncio.wait([self._life], timeout=timeout)

        self._loop.call(end)
        with contextlib.suppress(AssertionError):  # errors that nobody saw on the loop: aiomqtt's own
            self._loop.close()
