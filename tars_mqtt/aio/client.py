"""`MQTTClient` for asyncio: the engine of the threaded client, awaited instead of blocked on.

Sending is the engine's non-blocking path, called on the loop's thread; what happens on the engine's
threads comes back over one `Bridge`; connecting and shutting down block, on threads of our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from tars_mqtt._core.engine import Engine
from tars_mqtt._core.handler import HandlerCall, is_coroutine_function
from tars_mqtt._core.life import Attempt, HandlerShutdown
from tars_mqtt._core.option import HandlerOptions
from tars_mqtt._core.registry import Registration
from tars_mqtt._core.state import TRYING, ConnectionState
from tars_mqtt._core.stats import Stats
from tars_mqtt._core.timeout import DEFAULT, Timeout, seconds
from tars_mqtt.aio.blocking import BlockingCalls, to_the_end
from tars_mqtt.aio.direct import PahoFace
from tars_mqtt.aio.loop import Bridge, CoroutineCall, LoopDispatcher
from tars_mqtt.aio.receipt import PublishReceipt, resolve
from tars_mqtt.aio.room import Room
from tars_mqtt.aio.signals import on_signals
from tars_mqtt.aio.subscription import MessageIterator, Subscription
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import ClosedError, QueueFullError, SubscribeError
from tars_mqtt.message import PublishReceipt as CoreReceipt
from tars_mqtt.settings import Overrides, Settings
from tars_mqtt.topics import check_filter

__all__ = ["MQTTClient"]

HandlerT = TypeVar("HandlerT", bound=Callable[..., Any])
ReceiptT = TypeVar("ReceiptT", bound=CoreReceipt | None)
T = TypeVar("T")


class MQTTClient:
    """A service's connection to an MQTT broker, for asyncio. See `tars_mqtt.MQTTClient`.

    Belongs to the event loop on which it is first awaited, until it is shut down. An async context
    manager: connects on enter, shuts down on exit.
    """

    def __init__(
        self, mqtt_url: str, client_id: str, source_name: str | None = None, **settings: Unpack[Settings]
    ) -> None:
        self._start_up(MQTTClientConfig(mqtt_url, client_id, source_name, **settings))

    @classmethod
    def from_env(cls, prefix: str = "MQTT_", **overrides: Unpack[Overrides]) -> Self:
        """Make a client from environment variables; *overrides* win over them."""
        return cls.from_config(MQTTClientConfig.from_env(prefix, **overrides))

    @classmethod
    def from_config(cls, config: MQTTClientConfig) -> Self:
        """Make a client from checked settings."""
        client = cls.__new__(cls)
        client._start_up(config)
        return client

    def _start_up(self, config: MQTTClientConfig) -> None:
        self._bridge = Bridge()
        self._engine = Engine(config, partial(LoopDispatcher, self._bridge), self._bridge.start_call)
        dispatcher = self._engine.dispatcher
        assert isinstance(dispatcher, LoopDispatcher)
        self._dispatcher = dispatcher
        self._backlog = self._engine.backlog
        self._room = Room(self._backlog, self._bridge)
        self._publish_timeout = config.publish_timeout
        self._blocking_calls = BlockingCalls(config.client_id)
        self._stop: asyncio.Future[float | None] | None = None
        """Tells `run` that it is to end, and in which time."""
        self._aside: HandlerShutdown | None = None
        self._asides: set[asyncio.Task[None]] = set()
        """The shutdown that a handler has asked for, and perhaps one of the life before."""
        self._paho = PahoFace(self)

    def __repr__(self) -> str:
        return f"<aio.MQTTClient {self.config.client_id!r} at {self.config.urls[0]}, {self.state.value}>"

    def _on_loop(self) -> asyncio.AbstractEventLoop:
        """Return the running loop; it must be ours."""
        loop = asyncio.get_running_loop()
        if self._bridge.loop is not loop:
            self._engine.life.check()
            idle = self.state in (ConnectionState.NEW, ConnectionState.CLOSED, ConnectionState.DISCONNECTED)
            if self._bridge.loop is not None and not idle and not self._bridge.loop.is_closed():
                raise RuntimeError(
                    "this client belongs to another event loop: use it there, or make one client for each loop"
                )
            self._bridge.bind(loop)
            self._dispatcher.bound()
            self._stop = None  # of the loop before, as those
            self._asides.clear()
            self._aside = None
        return loop

    def _blocking(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return self._blocking_calls.start(self._on_loop(), call, *args)

    # -- connection -------------------------------------------------------------------------

    async def connect(self, timeout: Timeout = DEFAULT) -> None:
        """Connect and return when every registered subscription is acknowledged.

        Cancelled, it leaves nothing behind.
        """
        await self._connect(seconds(timeout, self.config.connect_timeout))

    async def _connect(self, limit: float | None) -> int:
        """Connect; returns which of the `Life.lives` that is in."""
        loop, life = self._on_loop(), self._engine.life
        latest_end = life.latest_end  # now, and not when a thread is free
        deadline = None if limit is None else loop.time() + limit
        attempts: list[Attempt] = []
        try:
            await to_the_end(self._blocking(lambda: attempts.append(life.begin(limit, latest_end))))
            await self._connected(attempts[0], deadline)
            life.came_about(attempts[0])
            return attempts[0].life
        except (Exception, asyncio.CancelledError) as error:
            if not attempts:
                raise
            told = await to_the_end(self._blocking(life.failed, attempts[0], limit, error))
            raise told from told.__cause__
        finally:
            for attempt in attempts:
                life.over(attempt)  # also where the loop ends, and nothing can be awaited
            if self.state is ConnectionState.DISCONNECTED:
                self._blocking_calls.release()

    async def _connected(self, attempt: Attempt, deadline: float | None) -> None:
        """Wait without a thread: many may wait for one client, through an outage without end."""
        async with asyncio.timeout_at(deadline):
            if not attempt.starts:
                attempt.check()
                await self._until(lambda state: state not in TRYING)
                self._engine.life.check_not_left()
            elif attempt.first.done():  # also where there is no time to wait
                attempt.first.result()
            else:
                await self._outcome(attempt.first, None)

    async def _until(self, predicate: Callable[[ConnectionState], bool]) -> None:
        changed = asyncio.Event()

        def listener() -> None:
            self._bridge.post(changed.set)

        self._engine.state.listen(listener)
        try:
            while not predicate(self.state):
                await changed.wait()
                changed.clear()
        finally:
            self._engine.state.ignore(listener)

    async def disconnect(self) -> None:
        """Leave the broker; `connect` may follow."""
        self._on_loop()
        try:
            await to_the_end(self._blocking(self._engine.life.disconnect))
        finally:
            self._blocking_calls.release()

    async def shutdown(self, timeout: Timeout = DEFAULT) -> None:
        """Finish the handlers, flush QoS 1 and 2, say goodbye, join every thread.

        Handlers that do not end in time are cancelled. A cancellation of the call itself is
        delivered when the work is done. In a handler it returns at once, and waits for that
        handler elsewhere.
        """
        await self._shut_down(seconds(timeout, self.config.shutdown_timeout), None)

    async def _shut_down(self, limit: float | None, life: int | None) -> None:
        """Shut down; with *life*, only that of the `Life.lives`."""
        self._on_loop()
        self._have_run_end(limit)
        shut_down = self._engine.life.shutdown
        if not self._dispatcher.in_handler():
            life = self._engine.life.asked_to_end() if life is None else life
            await self._until_shut_down(self._blocking(shut_down, limit, asyncio.current_task(), life), limit)
            return
        self._engine.life.check()
        life = self._engine.life.asked_to_end()
        if self._aside is not None and self._aside.hurry(life, limit):
            return
        self._aside = aside = HandlerShutdown(life, self._engine.life.deadlines)
        # A task keeps `asyncio.run` from closing the loop meanwhile: the handlers need it.
        shutdown = self._until_shut_down(self._blocking(shut_down, limit, None, life), limit)
        task = asyncio.Task(shutdown, loop=self._bridge.loop, context=contextvars.Context())
        task.add_done_callback(lambda _: aside.over.set())
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)

    def _have_run_end(self, limit: float | None) -> None:
        if self._stop is not None and not self._stop.done():
            self._stop.set_result(limit)

    async def _until_shut_down(self, work: asyncio.Future[None], limit: float | None) -> None:
        try:
            with self._engine.life.within(limit):  # from now on, and not when a thread is free
                await to_the_end(work)
        finally:
            self._blocking_calls.release()

    async def _await_asides(self, hurried: asyncio.Event) -> None:
        """Wait for the shutdown that a handler has asked for, if one has, for the time that it was given."""
        self._dispatcher.leave_iterators(asyncio.current_task())  # which waits, and reads them no more
        hurry = asyncio.ensure_future(hurried.wait())
        try:
            while self._asides and not hurry.done():
                await asyncio.wait({hurry, *self._asides}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurry.cancel()

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.shutdown()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._engine.life.forked:  # a child that leaves the block has nothing to end here
            return
        life = self._engine.life.asked_to_end()  # whoever connects when that has ended, goes on
        try:
            if exc is None:
                await self._await_asides(asyncio.Event())
        finally:
            await self._shut_down(self.config.shutdown_timeout, life)

    async def run(self, timeout: Timeout = DEFAULT) -> None:
        """Connect if needed, serve until SIGINT or SIGTERM, or until `shutdown`; then shut down.

        The timeout is that of `connect`; ``None`` waits for a broker that is not there yet.
        """
        loop = self._on_loop()
        self._stop = stop = loop.create_future()
        hurried = asyncio.Event()

        def end() -> None:
            hurried.set()
            self._have_run_end(self.config.shutdown_timeout)
            self._engine.life.call_off()

        life = None
        with on_signals(
            loop, end
        ):  # to the last: another one would end the process in the middle of its goodbye
            try:
                # Whoever connects when that has ended, goes on.
                life = await self._connect(seconds(timeout, self.config.connect_timeout))
                await asyncio.wait({stop})
            except ClosedError:
                if not stop.done():
                    raise
            finally:
                try:
                    await self._await_asides(hurried)
                finally:
                    try:
                        limit = stop.result() if stop.done() else self.config.shutdown_timeout
                        await self._shut_down(limit, life)
                    finally:
                        self._engine.life.forget_signals()

    async def wait_connected(self, timeout: float | None = None) -> bool:
        """Wait for the connection; False when the time ran out first."""
        self._engine.life.check()
        self._on_loop()
        over = (ConnectionState.CONNECTED, ConnectionState.CLOSED)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds(timeout, 0.0)):
                await self._until(lambda state: state in over)
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
    def client(self) -> PahoFace:
        """An awaitable face of the underlying paho-mqtt client, for what is not wrapped here."""
        return self._paho

    def stats(self) -> Stats:
        """A snapshot of the client's counters."""
        return self._engine.stats()

    # -- publishing -------------------------------------------------------------------------

    async def publish_event(
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
        """Publish *data* in an `Envelope` and return its id. Cancelling stops the wait, not the send."""
        # What `_send` does, in line: one more coroutine would cost a tenth of the rate of QoS 0.
        limit = seconds(timeout, self._publish_timeout)
        loop = asyncio.get_running_loop()
        if loop is not self._bridge.loop:
            self._on_loop()
        started = loop.time() if qos else 0.0
        event = topic, event_type, data, correlation_id, qos, retain, 0.0, properties, False
        try:
            receipt = self._engine.submit_event(*event)
        except QueueFullError as error:
            receipt = await self._room.submit(partial(self._engine.submit_event, *event), qos, error, limit)
        if qos:
            await PublishReceipt(receipt, self._bridge).result(_rest(limit, started, loop))
        elif self._backlog.crowd.there:
            await self._room.pace()
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
        """Publish like `publish_event`, without waiting; the receipt can be awaited.

        Args:
            timeout: Without effect: this never waits, and a full queue is a `QueueFullError` at once.
                Await `publish_event` to wait for room.

        With an `outbox` it holds up the loop until the disk has the event. `publish_event` does not, and many
        of them at once share what they wait for.
        """
        seconds(timeout, 0.0)
        receipt = self._engine.submit_event(
            topic, event_type, data, correlation_id, qos, retain, 0.0, properties
        )
        return PublishReceipt(receipt, self._bridge)

    async def publish(
        self,
        topic: str,
        payload: bytes | str,
        *,
        qos: int = 0,
        retain: bool = False,
        properties: Mapping[str, object] | None = None,
        timeout: Timeout = DEFAULT,
    ) -> None:
        """Publish raw bytes, or text as UTF-8, without an envelope."""
        message = topic, payload, qos, retain, 0.0, properties, False
        limit = seconds(timeout, self._publish_timeout)
        await self._send(partial(self._engine.submit, *message), qos, limit)

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
        """Publish like `publish`, without waiting: as `submit_event`, without an envelope."""
        seconds(timeout, 0.0)
        return PublishReceipt(self._engine.submit(topic, payload, qos, retain, 0.0, properties), self._bridge)

    async def publish_health(self, ok: bool, event: str | None = None, error: str | None = None) -> None:
        """Publish the service's own health: retained, QoS 1, on ``system/health/{source_name}``."""
        await self._send(
            partial(self._engine.health.publish, ok, event, error, 0.0), 1, self._publish_timeout
        )

    async def _send(self, submit: Callable[[], ReceiptT], qos: int, limit: float | None) -> ReceiptT:
        """Submit, when there is room; with QoS 1 and 2 wait for the acknowledgement."""
        loop = asyncio.get_running_loop()
        if loop is not self._bridge.loop:
            self._on_loop()
        started = loop.time() if qos else 0.0
        try:
            receipt = submit()
        except QueueFullError as error:
            receipt = await self._room.submit(submit, qos, error, limit)
        if qos and receipt is not None:
            await PublishReceipt(receipt, self._bridge).result(_rest(limit, started, loop))
        elif self._backlog.crowd.there:
            await self._room.pace()
        return receipt

    # -- subscribing ------------------------------------------------------------------------

    async def subscribe(
        self,
        topic: str,
        handler: Callable[[Any], Any],
        qos: int = 0,
        *,
        timeout: Timeout = DEFAULT,
        **options: Unpack[HandlerOptions],
    ) -> Subscription:
        """Have *handler* called with each message that matches.

        A coroutine function runs as a task on the loop, a plain function on a worker thread.
        """
        self._on_loop()
        limit = seconds(timeout, self.config.connect_timeout)
        registration = self._register(topic, handler, qos, options)
        try:
            await self._answered(self._engine.subscribe(registration), registration, limit)
        except asyncio.CancelledError:
            self._engine.unregister(registration)
            raise
        return Subscription(self, registration)

    def _register(
        self, topic: str, handler: Callable[[Any], Any], qos: int, options: HandlerOptions
    ) -> Registration:
        call = CoroutineCall if is_coroutine_function(handler) else HandlerCall
        return self._engine.register(topic, qos, call, handler, options)

    async def _answered(self, asked: Future[None], registration: Registration, limit: float | None) -> None:
        """Wait for the broker's answer; the registration is gone if that is no, or does not come."""
        try:
            await self._outcome(asked, limit)
        except (TimeoutError, SubscribeError) as error:
            raise self._engine.not_subscribed(registration, error, limit) from None

    async def _outcome(self, future: Future[Any], limit: float | None) -> None:
        """Await the engine's future, which stays as it is when the wait is cancelled."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self._bridge.post(lambda: resolve(done)))
        async with asyncio.timeout(limit):
            await done
        future.result(0)

    def on(
        self, topic: str, qos: int = 0, *, timeout: Timeout = DEFAULT, **options: Unpack[HandlerOptions]
    ) -> Callable[[HandlerT], HandlerT]:
        """Decorator form of `subscribe`; usable before `connect`.

        On a connected client it does not wait: a refusal of the broker is logged.
        """
        seconds(timeout, 0.0)
        check_filter(topic)  # ``@client.on`` without a filter would register nothing

        def decorate(handler: HandlerT) -> HandlerT:
            self._engine.subscribe(self._register(topic, handler, qos, options))
            return handler

        return decorate

    def messages(self, topic: str, qos: int = 0) -> MessageIterator:
        """Iterate over the messages: ``async for message in client.messages("a/#")``.

        Subscribes when the iteration begins, or on ``async with``. A message of QoS 1 or 2 is
        acknowledged when the next one is asked for.
        """
        return MessageIterator(self, topic, qos)


def _rest(limit: float | None, started: float, loop: asyncio.AbstractEventLoop) -> float | None:
    return None if limit is None else max(0.0, limit - (loop.time() - started))
