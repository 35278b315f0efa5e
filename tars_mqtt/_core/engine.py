"""The engine behind both clients: the parts, wired; starting and stopping in the right order."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from tars_mqtt._core.aside import Start
from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.claim import Claims
from tars_mqtt._core.connector import MQTT_3_1_1, MQTT_5
from tars_mqtt._core.dispatch import Consumer, Dispatcher, Taken
from tars_mqtt._core.handler import HandlerCall
from tars_mqtt._core.inbound import Inbound
from tars_mqtt._core.lane import Fifo, Keyed
from tars_mqtt._core.option import HandlerOptions, checked
from tars_mqtt._core.outbound import Outbound
from tars_mqtt._core.outgoing import Outgoing
from tars_mqtt._core.recovery import Recovery
from tars_mqtt._core.registry import Registration, Registry
from tars_mqtt._core.session import Session
from tars_mqtt._core.spool import Spool
from tars_mqtt._core.state import ConnectionState, StateCell
from tars_mqtt._core.stats import Counters, Stats
from tars_mqtt._core.timeout import seconds
from tars_mqtt._core.transport import Transport
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.dead_letter import DeadLetters, dead_letter_topic
from tars_mqtt.dedup import DurableDeduplicator, MessageDeduplicator
from tars_mqtt.envelope import encode_event
from tars_mqtt.errors import (
    ClosedError,
    ConnectError,
    NotConnectedError,
    SubscribeError,
    TarsMQTTError,
)
from tars_mqtt.health import Health
from tars_mqtt.message import Message, PublishReceipt
from tars_mqtt.topics import check_filter, topic_bytes

logger = logging.getLogger("tars_mqtt.session")
publish_logger = logging.getLogger("tars_mqtt.publish")

MakeDispatcher = Callable[
    [MQTTClientConfig, Counters, Callable[[], None], Callable[[str | None], None]], Dispatcher
]
_GOODBYE_SHARE = 0.1
"""Of the time for a shutdown: kept for the goodbye, whatever came before took."""

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """All that a client does, without saying how its caller waits.

    Methods that end in a future or a receipt return at once; `connect`, `disconnect` and
    `shutdown` block. Any thread.
    """

    def __init__(
        self,
        config: MQTTClientConfig,
        make_dispatcher: MakeDispatcher,
        start_call: Start | None = None,
    ) -> None:
        self.config = config
        self.state = StateCell()
        self.counters = Counters()
        self._registry = Registry()
        self.deduplicator = _deduplicator(config)
        transport = Transport(
            config.client_id,
            MQTT_3_1_1 if config.protocol == "3.1.1" else MQTT_5,
            clean=config.session_expiry == 0,
        )
        self.dispatcher = make_dispatcher(config, self.counters, transport.wake, self._on_stuck_handler)
        self.backlog = Backlog(
            config.max_queued, config.max_queued_bytes, transport.wake, transport.idle_stream
        )
        self._outbound = Outbound(self.backlog, config.max_inflight, self.counters, config.client_id)
        self.backlog.refuse(_not_started())
        self.health = Health(config, self.backlog)
        self._session = Session(
            config, transport, self.state, self._registry, self._outbound, self.health, start_call
        )
        self._session.inbound = Inbound(
            self._registry,
            self.dispatcher,
            self.counters,
            self._session.offer_to_paho,
            config.client_id,
            config.max_payload_bytes,
        )
        self._source = config.source_name
        self._correlation = config.correlation
        self.forked = False
        """Whether this is the child of a fork, and the client its parent's."""
        self._called_off = False
        # Guarded by _lock:
        self._lock = threading.Lock()
        self._first: Future[None] | None = None
        self._shutting_down = threading.Lock()
        _engines.add(self)

    @property
    def client(self) -> Any:
        """paho's client."""
        return self._session.transport.client

    # -- life -------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse to work in a forked child, which has neither the threads nor the connection."""
        if self.forked:
            raise ClosedError(
                "this client belongs to the parent of this forked process: make a new one after os.fork()"
            )

    def connect(self, timeout: float | None) -> None:
        """Start if needed and wait until the connection is up and the subscriptions acknowledged."""
        self.check()
        deadline = time.monotonic() + (threading.TIMEOUT_MAX / 2 if timeout is None else timeout)
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise ConnectError("the client is still busy leaving the broker; call connect() again")
        try:
            if self._shutting_down.locked():
                raise ClosedError("the client is being shut down: call connect() when that is over")
            # Asked before the thread starts: its first connection may come and go before this one looks.
            began = not self._session.running or self._first is None or not self._first.done()
            if not self._session.running:
                self._open_outbox()
                self.state.set(ConnectionState.CONNECTING)
                self.dispatcher.start()
                self.backlog.open()
                self._session.inbound.open()
                self._first = self._session.start()
            first = self._first
        finally:
            self._lock.release()
        assert first is not None
        if self._called_off and not first.done():
            self._session.interrupt()  # a signal came before there was anything to interrupt
        try:
            first.result(timeout)
            if not began:  # the first connection was there, even if it is gone by now
                self._await_connection(deadline)
        except FutureTimeoutError:
            reason = self._session.last_error
            if began:
                self.stop_network(0.0, first)
            raise ConnectError(
                f"no connection to {self.config.urls[0]} within {timeout:g} s"
                + (f": {reason}" if reason else "")
                + "; check mqtt_url, and whether a broker runs there"
                + ("" if began else ". The client keeps trying")
            ) from None
        except SubscribeError as error:
            raise SubscribeError(str(error), error.refused) from error
        except TarsMQTTError:
            self.stop_network(0.0, first)
            raise

    def _await_connection(self, deadline: float) -> None:
        """Wait for the connection of a client that had one already, and is about to get the next."""
        trying = (ConnectionState.CONNECTING, ConnectionState.RECONNECTING)
        left = max(0.0, deadline - time.monotonic())
        if not self.state.wait(lambda state: state not in trying, min(left, threading.TIMEOUT_MAX)):
            raise FutureTimeoutError
        if self.state.value is not ConnectionState.CONNECTED:
            raise ClosedError("the client left the broker while it connected")

    def _open_outbox(self) -> None:
        config = self.config
        if config.outbox is None or self.backlog.durable:
            return
        from tars_mqtt.outbox import Outbox  # late: most services need no SQLite

        outbox = Outbox(config.outbox)
        spool = Spool(outbox, self.dispatcher.timer.call_later, config.outbox_max_age, config.client_id)
        self.backlog.attach(spool, config.outbox_max_messages, config.outbox_max_bytes)
        if isinstance(self.deduplicator, DurableDeduplicator):
            self.deduplicator.attach(outbox, config.client_id)

    def call_off(self) -> None:
        """Have a `connect` that waits, or is about to, end with `ClosedError`. For signal handlers too."""
        self._called_off = True
        if self._first is not None and not self._first.done():
            self._session.interrupt()

    def stop_network(self, timeout: float, first: Future[None] | None = None) -> bool:
        """End the network thread; what is queued stays queued. False when it does not end in time.

        Args:
            first: Only the one that promised this; another may have been started since.
        """
        with self._lock:  # no `connect` between the end and what is said of it
            if first is not None and first is not self._first:
                return True
            if not self._closing:
                self.backlog.refuse(_not_started())  # first: what is queued leaves, and no more comes
            ended = self._session.leave(timeout)
            if not self._closing:
                self.state.set(ConnectionState.DISCONNECTED)
            return ended

    @property
    def _closing(self) -> bool:
        return self.state.value in (ConnectionState.CLOSING, ConnectionState.CLOSED)

    def disconnect(self) -> None:
        """Leave the broker; subscriptions stay registered, unsent messages of QoS 1 and 2 queued."""
        self.check()
        if not self._session.running:
            return
        deadline = time.monotonic() + self.config.shutdown_timeout
        self._say_goodbye("disconnected", deadline)
        self.stop_network(max(0.0, deadline - time.monotonic()))

    def _say_goodbye(self, event: str, deadline: float) -> None:
        if self.state.value in (ConnectionState.CONNECTED, ConnectionState.CLOSING) and self.backlog.online:
            receipt = self.health.goodbye(event)
            if receipt is not None:
                with contextlib.suppress(TarsMQTTError):
                    receipt.result(max(0.0, deadline - time.monotonic()))

    def shutdown(self, timeout: float, own: int | None = None, reader: object = None) -> None:
        """Finish the work, flush, say goodbye, join every thread.

        Args:
            own: See `Dispatcher.own_work`; for a caller on another thread or task than the one that asked.
            reader: See `Dispatcher.wait_idle`; this thread unless given.
        """
        self.check()
        own = self.dispatcher.own_work() if own is None else own
        if own and self._shutting_down.locked():
            return  # whoever shuts down waits for this very handler
        if not self._shutting_down.acquire(timeout=timeout):
            return
        try:
            if self.state.value is not ConnectionState.CLOSED:
                reader = reader or threading.current_thread()
                self._shutdown(time.monotonic() + timeout, timeout * _GOODBYE_SHARE, own, reader)
        finally:
            self._called_off = False
            self._shutting_down.release()

    def _shutdown(self, deadline: float, reserve: float, own: int, reader: object) -> None:
        def left(kept: float = 0.0) -> float:
            return max(0.0, deadline - kept - time.monotonic())

        extra = {"client_id": self.config.client_id}
        # A `connect` that is about to begin has begun by then, or is refused.
        begun = self._lock.acquire(timeout=left())
        self.state.set(ConnectionState.CLOSING)
        if begun:
            self._lock.release()
        self._session.inbound.close()
        if not self.dispatcher.wait_idle(left(2 * reserve), own, reader):
            logger.warning("shutdown: handlers still run; going on without them", extra=extra)
        self.backlog.refuse(ClosedError("the client was shut down: call connect() to use it again"))
        if self._session.running:
            self.backlog.wait_flushed(left(2 * reserve))
            self._say_goodbye("shutdown", deadline - reserve)
            if not self._session.leave(left()):
                logger.warning("shutdown: the network thread is stuck in the operating system", extra=extra)
        lost = self._outbound.abandon()
        if lost:
            logger.warning("shutdown: the broker did not acknowledge %d messages in time", lost, extra=extra)
        for name in self.dispatcher.stop(left()):
            logger.warning("shutdown: the handler on thread %s does not return", name, extra=extra)
        for registration in self._registry.registrations():
            if registration.consumer.handle is None:
                self.unregister(registration)  # nobody would take what comes after a later `connect`
        self.state.set(ConnectionState.CLOSED)
        logger.info("shut down", extra=extra)

    # -- publishing -------------------------------------------------------------------------

    def call_later(self, delay: float, call: Callable[[], None]) -> None:
        """Have *call* run later, on the timer thread."""
        self.dispatcher.timer.call_later(delay, call)

    def count_dead_letter(self, dropped: bool) -> None:
        """Count a message that no attempt could handle."""
        if dropped:
            self.counters.drop("dead_letter")
        else:
            self.counters.add("dead_letters")

    def when_room(self, callback: Callable[[], None]) -> None:
        """Have *callback* called once, when a refused message is worth another try."""
        self.backlog.when_room(callback)

    def never_mind(self, callback: Callable[[], None]) -> None:
        """Undo `when_room`."""
        self.backlog.never_mind(callback)

    def submit_event(
        self,
        topic: str,
        event_type: str,
        data: Any,
        correlation_id: str | None,
        qos: int,
        retain: bool,
        timeout: float | None,
        wait_stored: bool = True,
    ) -> PublishReceipt:
        """Wrap in an envelope and queue; for *wait_stored* see `Backlog.admit`."""
        raw_topic = topic_bytes(topic)
        envelope_id, payload = encode_event(event_type, data, self._source, correlation_id, self._correlation)
        receipt = self._submit(topic, raw_topic, payload, envelope_id, qos, retain, timeout, wait_stored)
        if publish_logger.isEnabledFor(logging.DEBUG):
            publish_logger.debug(
                "took an event for %r with %d bytes",
                topic,
                len(payload),
                extra={
                    "client_id": self.config.client_id,
                    "topic": topic,
                    "event_type": event_type,
                    "envelope_id": envelope_id,
                    "correlation_id": correlation_id,
                    "qos": qos,
                },
            )
        return receipt

    def submit(
        self,
        topic: str,
        payload: bytes | str,
        qos: int,
        retain: bool,
        timeout: float | None,
        wait_stored: bool = True,
    ) -> PublishReceipt:
        """Queue raw bytes; for *wait_stored* see `Backlog.admit`."""
        if isinstance(payload, str):
            payload = payload.encode()
        elif not isinstance(payload, bytes):
            if not isinstance(payload, (bytearray, memoryview)):
                raise TypeError(
                    f"the payload must be bytes or str, not {type(payload).__name__}: "
                    "publish_event takes other data"
                )
            payload = bytes(payload)  # the caller may change a buffer while it waits here
        return self._submit(topic, topic_bytes(topic), payload, None, qos, retain, timeout, wait_stored)

    def _submit(
        self,
        topic: str,
        raw_topic: bytes,
        payload: bytes,
        envelope_id: str | None,
        qos: int,
        retain: bool,
        timeout: float | None,
        wait_stored: bool,
    ) -> PublishReceipt:
        if self.forked:
            self.check()
        if retain not in (True, False):  # the text "false" would count as true
            raise ValueError(f"retain must be True or False, not {retain!r}")
        if qos == 0:
            self.backlog.admit_lossy(raw_topic, payload, bool(retain), timeout)
            return PublishReceipt(envelope_id, topic, 0)
        if qos not in (1, 2):
            raise ValueError(f"qos must be 0, 1 or 2, not {qos!r}")
        qos = int(qos)  # 1.0 from somebody's YAML
        receipt = PublishReceipt(envelope_id, topic, qos)
        self.backlog.admit(Outgoing(raw_topic, payload, qos, bool(retain), receipt), timeout, wait_stored)
        return receipt

    # -- subscribing ------------------------------------------------------------------------

    def register(
        self, topic: str, qos: int, call: type[HandlerCall] | None, handler: Any, options: HandlerOptions
    ) -> Registration:
        """Check and enter a subscription; the broker is not asked yet.

        Args:
            call: What handles a delivery with *handler*; None for an iterator.
        """
        self.check()
        topic = check_filter(topic)
        if qos not in (0, 1, 2):
            raise ValueError(f"qos must be 0, 1 or 2, not {qos!r}")
        qos = int(qos)
        checked_options = checked(options, self.config.workers)
        recovery = self._recovery(topic, checked_options)
        config = self.config
        identity = self._registry.next_identity(topic)
        claims = Claims(self.deduplicator, identity, config.correlation, self.counters, config.client_id)
        handle = None if call is None else call(handler, claims, self.counters, config.client_id)
        order_by = checked_options["order_by"]
        consumer = Consumer(
            lane=Fifo() if order_by is None else Keyed(),
            limit=0 if handle is None else checked_options["concurrency"] or 1,
            handle=handle,
            claims=claims,
            recovery=recovery,
        )
        key_of = order_by if callable(order_by) else _topic_of if order_by else None
        registration = Registration(topic, qos, consumer, key_of)
        self.dispatcher.add(consumer)
        self._registry.add(registration)
        return registration

    def _recovery(self, topic: str, options: HandlerOptions) -> Recovery:
        template = options["dead_letter"]
        if template is not None:
            dead_letter_topic(template, "a/b")
        return Recovery(
            retries=options["retries"],
            retry_delay=options["retry_delay"],
            timeout=seconds(options["handler_timeout"], self.config.handler_timeout) or None,
            bury=None if template is None else DeadLetters(template, topic, self, self.config.client_id).bury,
        )

    def _on_stuck_handler(self, topic: str | None) -> None:
        """Tell the world that a handler does not return, or that the last such one has."""
        with contextlib.suppress(TarsMQTTError):
            if topic is None:
                self.health.publish(True, "handler_returned", None, 0.0, quiet=True)
            else:
                error = f"the handler of {topic} does not return"
                self.health.publish(False, "handler_timeout", error, 0.0, quiet=True)

    def subscribe(self, registration: Registration) -> Future[None]:
        """Ask the broker; the future is done at once when there is no connection to ask on."""
        waiter: Future[None] = Future()
        entry = self._registry.router.get(registration.topic)
        if entry is None or not self._session.running:
            waiter.set_result(None)
        else:
            self._session.subscribe(entry, registration, waiter)
        return waiter

    def unregister(self, registration: Registration) -> Future[None]:
        """Remove a subscription; what waits for its handler is given up."""
        self.check()
        waiter: Future[None] = Future()
        entry = self._registry.remove(registration)
        self.dispatcher.remove(registration.consumer)
        if entry is None:
            waiter.set_result(None)
        elif self._session.running:
            self._session.unsubscribe(entry, waiter)
        else:
            self._session.forget(entry)
            waiter.set_result(None)
        return waiter

    def abandon(self, registration: Registration, taken: Taken | None) -> None:
        """Nobody refers to an iterator any more. Takes no lock: the collector may call at any point."""
        if not registration.consumer.closed and not self.forked:
            self._session.call(lambda: self._abandoned(registration, taken))

    def _abandoned(self, registration: Registration, taken: Taken | None) -> None:
        if taken is not None:
            self.dispatcher.finished(taken)
        self.unregister(registration)

    # -- looking ----------------------------------------------------------------------------

    def stats(self) -> Stats:
        """A snapshot of the counters."""
        session, outbound, backlog = self._session, self._outbound, self.backlog
        bytes_in, bytes_out = session.traffic
        return Stats(
            **self.counters.totals(),
            messages_in=session.inbound.messages,
            bytes_in=bytes_in,
            messages_out=outbound.messages + backlog.sent_at_once,
            bytes_out=bytes_out,
            acknowledged=outbound.acknowledgements,
            handled=self.dispatcher.handled,
            dropped=self.counters.dropped(),
            connections=session.connections,
            reconnects=max(0, session.connections - 1),
            queued=backlog.held,
            queued_bytes=backlog.held_bytes,
            inflight=outbound.inflight,
            pending=self.dispatcher.pending,
            last_error=session.last_error,
            ping_round_trip=session.ping_round_trip,
        )

    def _after_fork_in_child(self) -> None:
        # No lock may be touched: another thread of the parent may have held it.
        self.forked = True
        self._session.transport.release_descriptors()


def _deduplicator(config: MQTTClientConfig) -> MessageDeduplicator | None:
    if not config.dedupe_ttl:
        return None
    kind = DurableDeduplicator if config.dedupe_durable else MessageDeduplicator
    return kind(config.dedupe_ttl, config.dedupe_max_entries)


def _topic_of(message: Message) -> str:
    return message.topic


def _not_started() -> NotConnectedError:
    return NotConnectedError("the client is not connected: call connect() first")


def _after_fork_in_child() -> None:
    for engine in list(_engines):
        engine._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
