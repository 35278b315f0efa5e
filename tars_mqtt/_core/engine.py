"""The engine behind both clients: the parts, wired; publishing, subscribing and looking."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from tars_mqtt._core.aside import Start
from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.claim import Claims
from tars_mqtt._core.connector import MQTT_3_1_1, MQTT_5
from tars_mqtt._core.dispatch import Consumer, Dispatcher, Taken
from tars_mqtt._core.handler import HandlerCall, name_of
from tars_mqtt._core.inbound import Inbound
from tars_mqtt._core.lane import Fifo, Keyed
from tars_mqtt._core.life import Life
from tars_mqtt._core.option import HandlerOptions, checked
from tars_mqtt._core.outbound import Outbound
from tars_mqtt._core.outgoing import Outgoing
from tars_mqtt._core.property import Properties, encode_properties
from tars_mqtt._core.recovery import Recovery
from tars_mqtt._core.registry import Registration, Registry
from tars_mqtt._core.session import Session
from tars_mqtt._core.spool import Spool
from tars_mqtt._core.state import StateCell
from tars_mqtt._core.stats import Counters, Stats
from tars_mqtt._core.timeout import seconds
from tars_mqtt._core.transport import Transport
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.dead_letter import DeadLetters, dead_letter_topic
from tars_mqtt.dedup import DurableDeduplicator, MessageDeduplicator
from tars_mqtt.envelope import encode_event
from tars_mqtt.errors import EncodeError, SubscribeError, fresh
from tars_mqtt.health import Health
from tars_mqtt.message import Message, PublishReceipt
from tars_mqtt.topics import check_filter, topic_bytes

publish_logger = logging.getLogger("tars_mqtt.publish")

MakeDispatcher = Callable[
    [MQTTClientConfig, Counters, Callable[[], None], Callable[[str | None], None]], Dispatcher
]
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """All that a client does, without saying how its caller waits.

    Methods return a future or a receipt, and do not wait for the broker; `submit` and `submit_event` may wait for
    room, and for the disk. What waits for more is in its `life`. Any thread.
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
            config.max_queued,
            config.max_queued_bytes,
            transport.wake,
            transport.idle_stream,
            config.client_id,
        )
        self._outbound = Outbound(self.backlog, config.max_inflight, self.counters, config.client_id)
        self.health = Health(config, self.backlog)
        inbound = Inbound(
            self._registry,
            self.dispatcher,
            self.counters,
            transport.offer_to_paho,
            config.client_id,
            config.max_payload_bytes,
        )
        self._session = Session(
            config, transport, self.state, self._registry, inbound, self._outbound, self.health, start_call
        )
        self._source = config.source_name
        self._correlation = config.correlation
        self.life = Life(
            config,
            self.state,
            self._session,
            self.dispatcher,
            self.backlog,
            self._outbound,
            self.health,
            prepare=self._open_outbox,
            retire=self._retire,
        )
        _engines.add(self)

    @property
    def client(self) -> Any:
        """paho's client."""
        return self._session.transport.client

    def _open_outbox(self) -> None:
        config = self.config
        if config.outbox is None or self.backlog.durable:
            return
        from tars_mqtt.outbox import Outbox  # late: most services need no SQLite

        outbox = Outbox(config.outbox, client_id=config.client_id)
        spool = Spool(outbox, self.dispatcher.timer.call_later, config.outbox_max_age, config.client_id)
        self.backlog.attach(spool, config.outbox_max_messages, config.outbox_max_bytes)
        if isinstance(self.deduplicator, DurableDeduplicator):
            self.deduplicator.attach(outbox, config.client_id)

    # -- publishing -------------------------------------------------------------------------

    def submit_event(
        self,
        topic: str,
        event_type: str,
        data: Any,
        correlation_id: str | None,
        qos: int,
        retain: bool,
        timeout: float | None,
        properties: Mapping[str, object] | None = None,
        wait_stored: bool = True,
    ) -> PublishReceipt:
        """Wrap in an envelope and queue; for *wait_stored* see `Backlog.admit`."""
        raw_topic = topic_bytes(topic)
        envelope_id, payload = encode_event(event_type, data, self._source, correlation_id, self._correlation)
        receipt = self._submit(
            topic, raw_topic, payload, envelope_id, qos, retain, timeout, properties, wait_stored
        )
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
        properties: Mapping[str, object] | None = None,
        wait_stored: bool = True,
    ) -> PublishReceipt:
        """Queue raw bytes; for *wait_stored* see `Backlog.admit`."""
        if isinstance(payload, str):
            try:
                payload = payload.encode()
            except UnicodeEncodeError:
                raise EncodeError("the payload holds half of a surrogate pair", "payload") from None
        elif not isinstance(payload, bytes):
            if not isinstance(payload, (bytearray, memoryview)):
                raise TypeError(
                    f"the payload must be bytes or str, not {type(payload).__name__}: "
                    "publish_event takes other data"
                )
            payload = bytes(payload)  # the caller may change a buffer while it waits here
        return self._submit(
            topic, topic_bytes(topic), payload, None, qos, retain, timeout, properties, wait_stored
        )

    def _submit(
        self,
        topic: str,
        raw_topic: bytes,
        payload: bytes,
        envelope_id: str | None,
        qos: int,
        retain: bool,
        timeout: float | None,
        properties: Mapping[str, object] | None,
        wait_stored: bool,
    ) -> PublishReceipt:
        if self.life.forked:
            self.life.check()
        if retain not in (True, False):  # the text "false" would count as true
            raise ValueError(f"retain must be True or False, not {retain!r}")
        packed = b"" if properties is None else encode_properties(properties)
        if qos == 0:
            self.backlog.admit_lossy(raw_topic, payload, bool(retain), timeout, packed)
            return PublishReceipt(envelope_id, topic, 0)
        if qos not in (1, 2):
            raise ValueError(f"qos must be 0, 1 or 2, not {qos!r}")
        qos = int(qos)  # 1.0 from somebody's YAML
        receipt = PublishReceipt(envelope_id, topic, qos)
        message = Outgoing(raw_topic, payload, qos, bool(retain), receipt)
        if packed:
            message.properties = Properties.since(packed, time.monotonic())
        self.backlog.admit(message, timeout, wait_stored)
        return receipt

    # -- subscribing ------------------------------------------------------------------------

    def register(
        self, topic: str, qos: int, call: type[HandlerCall] | None, handler: Any, options: HandlerOptions
    ) -> Registration:
        """Check and enter a subscription; the broker is not asked yet.

        Args:
            call: What handles a delivery with *handler*; None for an iterator.
        """
        self.life.check()
        topic = check_filter(topic)
        if qos not in (0, 1, 2):
            raise ValueError(f"qos must be 0, 1 or 2, not {qos!r}")
        qos = int(qos)
        checked_options = checked(options, self.config.workers)
        recovery = self._recovery(topic, checked_options)
        config = self.config
        identity = self._registry.next_identity(topic, "" if call is None else name_of(handler))
        claims = Claims(self.deduplicator, identity, config.correlation, self.counters, config.client_id)
        handle = (
            None if call is None else call(handler, claims, self.counters, config.client_id, recovery.verdict)
        )
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
            retry_on=options["retry_on"],
            retry_delay=options["retry_delay"],
            timeout=seconds(options["handler_timeout"], self.config.handler_timeout) or None,
            bury=None if template is None else self._dead_letters(template, topic).bury,
            client_id=self.config.client_id,
        )

    def _dead_letters(self, template: str, topic_filter: str) -> DeadLetters:
        return DeadLetters(
            template,
            topic_filter,
            self.submit_event,
            self.backlog,
            self.dispatcher.timer.call_later,
            self.counters,
            self.config.client_id,
        )

    def _on_stuck_handler(self, topic: str | None) -> None:
        """Tell the world that a handler does not return, or that the last such one has."""
        if topic is None:
            self.health.handlers_returned()
        else:
            self.health.handler_stuck(topic)

    def subscribe(self, registration: Registration) -> Future[None]:
        """Ask the broker; the future is done at once when there is no connection to ask on."""
        waiter: Future[None] = Future()
        entry = self._registry.router.get(registration.topic_filter)
        if entry is None or not self._session.thread.running:
            waiter.set_result(None)
        else:
            self._session.subscribe(entry, registration, waiter)
        return waiter

    def not_subscribed(
        self, registration: Registration, error: TimeoutError | SubscribeError, limit: float | None
    ) -> SubscribeError:
        """The broker refused, or did not answer within *limit*: remove the registration; what to tell the caller."""
        self.unregister(registration)
        if isinstance(error, SubscribeError):
            return fresh(error)
        topic = registration.topic_filter
        return SubscribeError(
            f"the broker did not answer the subscription {topic!r} within {limit:g} s", [(topic, "no answer")]
        )

    def unregister(self, registration: Registration) -> Future[bool]:
        """Remove a subscription; what waits for its handler is given up.

        Returns:
            Done when the broker has answered, or is not to be asked now.
        """
        self.life.check()
        waiter: Future[bool] = Future()
        entry = self._registry.remove(registration)
        self.dispatcher.remove(registration.consumer)
        if entry is None:
            waiter.set_result(False)
        elif self._session.thread.running:
            self._session.unsubscribe(entry, waiter)
        else:
            self._session.forget(entry)
            waiter.set_result(False)
        return waiter

    def abandon(self, registration: Registration, taken: Taken | None) -> None:
        """Nobody refers to an iterator any more. Takes no lock: the collector may call at any point."""
        if not registration.consumer.closed and not self.life.forked:
            self._session.thread.call(lambda: self._abandoned(registration, taken))

    def _retire(self) -> None:
        """A life is over: what its handlers and iterators leave unfinished is for those of the next."""
        if self.deduplicator is not None:
            self.deduplicator.release_all()
        for registration in self._registry.registrations():
            if registration.consumer.handle is None:
                self.unregister(registration)

    def _abandoned(self, registration: Registration, taken: Taken | None) -> None:
        if taken is not None:
            self.dispatcher.finished(taken)
        self.unregister(registration)

    # -- looking ----------------------------------------------------------------------------

    def stats(self) -> Stats:
        """A snapshot of the counters."""
        self.life.check()  # in a forked child the locks of the counters may never come free
        session, outbound, backlog = self._session, self._outbound, self.backlog
        bytes_in, bytes_out = session.traffic
        return Stats(
            **self.counters.totals(),
            messages_in=session.inbound.messages,
            bytes_in=bytes_in,
            messages_out=outbound.sent_count + backlog.sent_at_once,
            bytes_out=bytes_out,
            acknowledged=outbound.acknowledged_count,
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
        self.life.forked = True
        self._session.transport.release_descriptors()


def _deduplicator(config: MQTTClientConfig) -> MessageDeduplicator | None:
    if not config.dedupe_ttl:
        return None
    kind = DurableDeduplicator if config.dedupe_durable else MessageDeduplicator
    return kind(config.dedupe_ttl, config.dedupe_max_entries)


def _topic_of(message: Message) -> str:
    return message.topic


def _after_fork_in_child() -> None:
    for engine in list(_engines):
        engine._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
