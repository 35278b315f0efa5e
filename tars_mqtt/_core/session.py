"""The story of the connection: get one, keep it, get the next."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import attrs

from tars_mqtt._core import wire
from tars_mqtt._core.backoff import Backoff
from tars_mqtt._core.inbound import Inbound
from tars_mqtt._core.outbound import Outbound
from tars_mqtt._core.registry import FilterEntry, Registration, Registry
from tars_mqtt._core.state import ConnectionState, StateCell
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.transport import (
    LAST_PAHO_PACKET_ID,
    Connack,
    ConnectionLostError,
    ConnectRequest,
    Goodbye,
    Interrupted,
    Packets,
    Suback,
    Transport,
    Unsuback,
    Will,
)
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import ClosedError, ConfigError, ConnectError, ConnectRefusedError, SubscribeError
from tars_mqtt.url import BrokerURL

logger = logging.getLogger("tars_mqtt.session")

MQTT_5 = 5
MQTT_3_1_1 = 4

_RETRIABLE = frozenset((0x03, 0x80, 0x81, 0x82, 0x83, 0x88, 0x89, 0x97, 0x9C, 0x9F))
"""CONNACK codes that another attempt may cure; 0x03 is "server unavailable" of MQTT 3.1.1."""

_UNSUPPORTED_VERSION = frozenset((0x01, 0x84))
_TAKEN_OVER = 0x8E
_PACKET_LIMIT = 268_435_455 + 5
_HOMELESS_TIME = 2.0
"""Seconds after the last subscribe that messages of an earlier process wait for one to take them."""


class Companion(Protocol):
    """What goes along with a connection: health and heartbeat. Called on the network thread."""

    def will(self) -> Will | None:
        """The last will for the next connection."""

    def ready(self, first: bool) -> None:
        """The connection is up and the subscriptions are acknowledged."""

    def tick(self, now: float) -> float:
        """Do what is due; return when to be called again, on the monotonic clock."""


class VersionRefusedError(Exception):
    """This version of the protocol did not work out; another may. Internal."""


@attrs.define
class Liveness:
    """When the connection last showed life. Owned by the network thread.

    The peer is asked for a sign of life after half of the shorter of *keepalive* and *patience*
    without traffic in either direction, and given up after *patience* seconds without a byte.
    """

    keepalive: float
    patience: float
    received: float
    sent: float
    bytes_in: int = 0
    bytes_out: int = 0
    asked: float | None = None
    suspected: bool = False

    @property
    def interval(self) -> float:
        return min(self.keepalive, self.patience) / 2

    def note(self, now: float, bytes_in: int, bytes_out: int) -> None:
        """Take note of how many bytes came and went so far."""
        if bytes_in != self.bytes_in:
            self.bytes_in = bytes_in
            self.received = now
            self.suspected = False
        if bytes_out != self.bytes_out:
            self.bytes_out = bytes_out
            self.sent = now

    def ping_due(self, now: float) -> bool:
        """Whether to ask for a sign of life now."""
        return self.asked is None and now >= min(self.received, self.sent) + self.interval

    def deadline(self) -> float:
        """When the next of the two decisions is due."""
        if self.asked is None:
            return min(self.received, self.sent) + self.interval
        return self.received + self.patience


class Session:
    """Runs the network thread.

    `start` and `leave` bracket one life of it; the object can be started again. Everything but the
    methods in the first group runs on that thread.
    """

    def __init__(
        self,
        config: MQTTClientConfig,
        state: StateCell,
        registry: Registry,
        outbound: Outbound,
        counters: Counters,
        companion: Companion,
    ) -> None:
        self._config = config
        self._state = state
        self._registry = registry
        self._outbound = outbound
        self._counters = counters
        self._companion = companion
        self._urls = deque(config.urls)
        # Any thread:
        self._commands: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._leave_by: float | None = None
        self.transport = Transport(config.client_id, self._first_version(), config.session_expiry == 0)
        self.inbound: Inbound
        self.last_error: str | None = None
        self.ping_round_trip: float | None = None
        self.connections = 0
        # Owned by the network thread:
        self._bytes_in = 0
        self._bytes_out = 0
        self._first: Future[None] = Future()
        self._proven_version: int | None = None
        self._version = self._first_version()
        self._backoff = Backoff(config.reconnect_min_delay, config.reconnect_max_delay)
        self._session = 0
        self._identifiers = False
        self._restoring: dict[int, FilterEntry] = {}
        self._subscribing: dict[int, FilterEntry] = {}
        self._unsubscribing: dict[int, Future[None]] = {}
        self._refused: list[tuple[str, str]] = []
        self._serving = False
        self._ready = False
        self._liveness = Liveness(1.0, 1.0, 0.0, 0.0)
        self._restore_by = float("inf")
        self._homeless_until: float | None = None
        self._taken_over = False

    # -- any thread -------------------------------------------------------------------------

    def start(self) -> Future[None]:
        """Start the network thread; the future tells how the first connection came out."""
        self._first = Future()
        self._leave_by = None
        self._backoff.reset()
        if self.transport.closed:
            self.transport = Transport(self._config.client_id, self._version, self._config.session_expiry == 0)
        self._thread = threading.Thread(
            target=self._run, name=f"tars-mqtt/{self._config.client_id}/network", daemon=True
        )
        first = self._first
        self._thread.start()
        return first

    def leave(self, timeout: float) -> bool:
        """Say goodbye and end the network thread; False when it does not end in time."""
        thread = self._thread
        if thread is None:
            return True
        self._leave_by = time.monotonic() + timeout
        self.transport.wake()
        if thread is threading.current_thread():
            raise RuntimeError("the network thread cannot wait for itself")
        # The goodbye keeps to the deadline; the thread needs a moment more to end.
        thread.join(timeout + 0.5)
        if thread.is_alive():
            return False
        self._thread = None
        return True

    @property
    def running(self) -> bool:
        """Whether there is a network thread."""
        return self._thread is not None

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes read and written, over all connections."""
        bytes_in, bytes_out = self.transport.traffic
        return self._bytes_in + bytes_in, self._bytes_out + bytes_out

    def wake(self) -> None:
        """Let the network thread look at its queues."""
        self.transport.wake()

    def call(self, command: Callable[[], None]) -> None:
        """Have *command* run on the network thread soon; it must not block or raise."""
        self._commands.append(command)
        self.transport.wake()

    # -- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._leave_by is None:
                try:
                    delay = self._one_connection()
                except Interrupted:
                    break
                except Exception as error:
                    # A bug of ours costs one connection, not the service.
                    logger.exception("internal error on the network thread; reconnecting")
                    delay = self._failed(ConnectError(f"internal error: {error!r}"))
                self._wait(delay)
        finally:
            self.transport.close()
            self._run_commands()
            if not self._first.done():
                self._first.set_exception(ClosedError("the client was shut down while it connected"))

    def _one_connection(self) -> float:
        """Connect and serve until the connection is lost; returns the delay before the next."""
        try:
            connack = self._connect()
        except ConnectRefusedError as error:
            return self._failed(error, curable=error.retriable)
        except ConfigError as error:
            return self._failed(error, curable=False)
        except ConnectError as error:
            return self._failed(error)
        started = time.monotonic()
        lost = "the connection was closed"
        try:
            self._established(connack)
            self._serve()
        except (ConnectionLostError, wire.MalformedPacketError) as error:
            lost = str(error)
        finally:
            self._lost(lost)
        return self._delay_after(time.monotonic() - started)

    def _failed(self, error: Exception, curable: bool = True) -> float:
        self.transport.drop()
        self.last_error = str(error)
        if not curable and self._settle_first(error):
            self._leave_by = time.monotonic()
            return 0.0
        delay = self._backoff.next() if curable else self._backoff.longest()
        logger.log(
            logging.WARNING if curable else logging.ERROR,
            "%s; next attempt in %.1f s",
            error,
            delay,
            extra={
                "client_id": self._config.client_id,
                "attempt": self._backoff.attempt,
                "delay": round(delay, 3),
            },
        )
        return delay

    def _settle_first(self, error: Exception | None) -> bool:
        """Tell whoever waits in connect(); False when nobody does."""
        if self._first.done():
            return False
        if error is None:
            self._first.set_result(None)
        else:
            self._first.set_exception(error)
        return True

    def _delay_after(self, held: float) -> float:
        """How long to wait after a connection of that many seconds."""
        if self._taken_over:
            return self._backoff.longest()
        if held > max(self._backoff.ceiling, 1.0):
            self._backoff.reset()
        return self._backoff.next()

    def _wait(self, delay: float) -> None:
        until = time.monotonic() + delay
        while self._leave_by is None:
            self.transport.acknowledge_wake()
            self._run_commands()
            now = time.monotonic()
            if now >= until:
                return
            self.transport.sleep(until - now)

    def _interrupted(self) -> bool:
        return self._leave_by is not None

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    # -- connecting -------------------------------------------------------------------------

    def _first_version(self) -> int:
        return MQTT_3_1_1 if self._config.protocol == "3.1.1" else MQTT_5

    def _versions(self) -> tuple[int, ...]:
        if self._config.protocol != "auto":
            return (self._first_version(),)
        if self._proven_version is not None:
            return (self._proven_version,)
        return MQTT_5, MQTT_3_1_1

    def _connect(self) -> Connack:
        """Get one connection.

        Raises:
            ConnectError: The broker cannot be reached, or refuses.
            Interrupted: The client is leaving.
        """
        self._state.replace(ConnectionState.NEW, ConnectionState.CONNECTING)
        url = self._urls[0]
        deadline = time.monotonic() + self._config.connect_timeout
        versions = self._versions()
        for number, version in enumerate(versions, start=1):
            try:
                connack = self._handshake(url, version, deadline, last=number == len(versions))
            except VersionRefusedError as error:
                self.transport.drop()
                self._proven_version = None
                if number == len(versions):
                    raise ConnectError(f"no connection to {url}: {error}") from None
                logger.info("%s with MQTT 5; trying MQTT 3.1.1", error, extra=self._extra())
            except ConnectionLostError as error:
                raise ConnectError(f"no connection to {url}: {error}") from None
            else:
                self._version = self._proven_version = version
                return connack
        raise AssertionError("unreachable")

    def _handshake(self, url: BrokerURL, version: int, deadline: float, last: bool) -> Connack:
        config = self._config
        username, password = config.credentials(url)
        request = ConnectRequest(
            url=url,
            version=version,
            client_id=config.client_id,
            username=username,
            password=password,
            keepalive=config.keepalive,
            session_expiry=int(config.session_expiry),
            receive_maximum=min(config.max_pending, 65_535),
            packet_limit=_PACKET_LIMIT,
            will=self._companion.will(),
            deadline=deadline,
        )
        self.transport.open(request, self._interrupted)
        now = time.monotonic()
        answer_by = deadline if last else now + (deadline - now) / 2
        try:
            connack = self._await_connack(answer_by)
        except (ConnectionLostError, wire.MalformedPacketError) as error:
            if config.protocol == "auto" and self._proven_version is None:
                raise VersionRefusedError(str(error)) from None
            raise ConnectionLostError(str(error)) from None
        if connack.code in _UNSUPPORTED_VERSION:
            raise VersionRefusedError(f"the broker at {url} does not speak this version of MQTT")
        if connack.code:
            retriable = connack.code in _RETRIABLE
            raise ConnectRefusedError(
                f"the broker at {url} refused the connection: {connack.reason}"
                + ("" if retriable else "; check client_id, username, password and the broker's rules"),
                reason=connack.reason,
                code=connack.code,
                retriable=retriable,
            )
        return connack

    def _await_connack(self, deadline: float) -> Connack:
        while True:
            if self._interrupted():
                raise Interrupted
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise ConnectionLostError("the broker did not answer CONNECT in time")
            self.transport.acknowledge_wake()
            if self._interrupted():
                raise Interrupted
            for event in self.transport.poll(remaining, more=False):
                if isinstance(event, Connack):
                    return event
                if isinstance(event, Goodbye):
                    raise ConnectionLostError(f"the broker ended the connection: {event.reason}")
                raise ConnectionLostError("the broker did not begin with CONNACK [MQTT-3.2.0-1]")

    # -- connected --------------------------------------------------------------------------

    def _established(self, connack: Connack) -> None:
        now = time.monotonic()
        config = self._config
        v5 = self._version == MQTT_5
        keepalive = float(connack.keepalive or config.keepalive)
        patience = 1.5 * keepalive
        if config.enable_heartbeat:
            patience = min(patience, 3 * config.heartbeat_interval)
        self._liveness = Liveness(keepalive, patience, now, now)
        self._taken_over = False
        first = self.connections == 0
        self.connections += 1
        if not connack.session_present or first:
            self._session += 1
        self._identifiers = connack.subscription_identifiers
        self.inbound.new_connection(v5, connack.session_present, first)
        self._outbound.connected(connack, v5)
        self._homeless_until = now + _HOMELESS_TIME if first and connack.session_present else None
        self._serving = True
        self._restore_by = now + config.connect_timeout
        for entry in self._registry.entries():
            if entry.session != self._session:
                entry.replay = entry.registrations
                self._restoring[self._send_subscribe(entry)] = entry
        logger.info(
            "connected to %s with MQTT %s, %s session",
            self._urls[0],
            "5" if v5 else "3.1.1",
            "resumed" if connack.session_present else "new",
            extra=self._extra(),
        )
        self._ready_if_restored()

    def _ready_if_restored(self) -> None:
        if self._restoring or self._ready:
            return
        self._ready = True
        self._restore_by = float("inf")
        self._state.set(ConnectionState.CONNECTED)
        self._companion.ready(first=self.connections == 1)
        refused, self._refused = self._refused, []
        self._settle_first(_subscribe_error(refused) if refused else None)

    def _serve(self) -> None:
        """Move packets until the connection is lost or the client leaves."""
        transport, inbound, outbound = self.transport, self.inbound, self._outbound
        write = transport.write
        while self._leave_by is None:
            transport.acknowledge_wake()
            if self._commands:
                self._run_commands()
            for packet in inbound.acknowledgements():
                write(packet)
            more = outbound.pump(write, transport.unsent_bytes)
            for event in transport.poll(self._until_next_duty(), more):
                self._on(event)
        self._say_goodbye()

    def _on(self, event: object) -> None:
        match event:
            case Packets(packets):
                self._on_packets(packets)
            case Suback(packet_id, codes):
                self._on_suback(packet_id, codes)
            case Unsuback(packet_id):
                future = self._unsubscribing.pop(packet_id, None)
                if future is not None:
                    future.set_result(None)
            case Goodbye(code, reason):
                if code == _TAKEN_OVER:
                    self._taken_over = True
                    raise ConnectionLostError(
                        f"taken over by another client with the same id {self._config.client_id!r}"
                    )
                raise ConnectionLostError(f"the broker ended the connection: {reason}")
            case Connack():
                raise ConnectionLostError("the broker sent a second CONNACK")

    def _on_packets(self, packets: list[tuple[int, bytes]]) -> None:
        inbound, v5 = self.inbound, self._version == MQTT_5
        for first, body in packets:
            kind = first & 0xF0
            if kind == wire.PUBLISH:
                inbound.publish(first, body)
            elif kind == wire.PINGRESP:
                self._on_pingresp()
            else:
                self._on_acknowledgement(kind, first, body, v5)
        inbound.hand_over()

    def _on_acknowledgement(self, kind: int, first: int, body: bytes, v5: bool) -> None:
        packet_id, reason = wire.decode_ack(body, v5)
        if kind == wire.PUBREL & 0xF0:
            answer = self.inbound.release(packet_id)
            if answer is None:
                self.transport.hand_to_paho(first, body)
        elif packet_id <= LAST_PAHO_PACKET_ID:
            self.transport.hand_to_paho(first, body)
            return
        else:
            answer = self._outbound.acknowledged(kind, packet_id, reason)
        if answer is not None:
            self.transport.write(answer)

    def _on_pingresp(self) -> None:
        asked, self._liveness.asked = self._liveness.asked, None
        if asked is not None:
            self.ping_round_trip = time.monotonic() - asked

    def offer_to_paho(self, first: int, body: bytes) -> bool:
        """Let a direct user of paho have a PUBLISH that no subscription of ours takes."""
        if not self.transport.paho_wants_messages:
            return False
        self.transport.hand_to_paho(first, body)
        return True

    # -- subscriptions ----------------------------------------------------------------------

    def subscribe(self, entry: FilterEntry, registration: Registration, waiter: Future[None]) -> None:
        """Ask the broker for a filter now, or when there is a connection again.

        A filter that the broker has already is asked for again when another registration joins
        it: the answer brings the retained messages, which go to the newcomer alone.
        """
        self.inbound.rehouse()
        self.inbound.hand_over()
        if self._homeless_until is not None:
            self._homeless_until = time.monotonic() + _HOMELESS_TIME
        asked = registration in entry.replay
        if not self._serving or (asked and entry.session == self._session):
            waiter.set_result(None)
            return
        entry.waiters.append(waiter)
        if asked:
            return
        entry.replay = (registration,)
        try:
            self._subscribing[self._send_subscribe(entry)] = entry
        except ConnectionLostError:
            pass  # asked again on the next connection, which the loop is about to look for

    def unsubscribe(self, entry: FilterEntry, waiter: Future[None]) -> None:
        """Tell the broker that a filter is not needed any more."""
        self._settle_waiters(entry, None)
        if not self._serving or self._registry.router.get(entry.topic_filter) is not None:
            waiter.set_result(None)
            return
        try:
            self._unsubscribing[self.transport.unsubscribe(entry.topic_filter)] = waiter
        except ConnectionLostError:
            waiter.set_result(None)

    def _send_subscribe(self, entry: FilterEntry) -> int:
        entry.session = 0
        return self.transport.subscribe(
            entry.topic_filter, entry.qos, entry.identifier if self._identifiers else None
        )

    def _on_suback(self, packet_id: int, codes: tuple[int, ...]) -> None:
        restoring = packet_id in self._restoring
        entry = self._restoring.pop(packet_id, None) or self._subscribing.pop(packet_id, None)
        if entry is None:
            return  # a direct use of paho's client
        code = codes[0] if codes else 0x80
        if code < 0x80:
            entry.session = self._session
            self._settle_waiters(entry, None)
        else:
            reason = wire.reason_name(0x90, code)
            logger.error(
                "the broker refused the subscription %r: %s", entry.topic_filter, reason, extra=self._extra()
            )
            self._settle_waiters(entry, _subscribe_error([(entry.topic_filter, reason)]))
            if restoring:
                self._refused.append((entry.topic_filter, reason))
        self._ready_if_restored()

    def _settle_waiters(self, entry: FilterEntry, error: SubscribeError | None) -> None:
        waiters, entry.waiters = entry.waiters, []
        for waiter in waiters:
            if not waiter.done():
                if error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(error)

    # -- time -------------------------------------------------------------------------------

    def _until_next_duty(self) -> float:
        """Do what is due; return how many seconds may pass before the next look."""
        now = time.monotonic()
        liveness = self._liveness
        liveness.note(now, *self.transport.traffic)
        if liveness.ping_due(now):
            self.transport.write(wire.PINGREQ_PACKET)
            liveness.asked = now
        if now >= liveness.received + liveness.patience:
            if liveness.suspected:
                raise ConnectionLostError(f"no sign of life from the broker for {now - liveness.received:.1f} s")
            # The thread may have been held up itself: one more look at the socket first.
            liveness.suspected = True
            return 0.0
        if now >= self._restore_by:
            raise ConnectionLostError("the broker did not acknowledge the subscriptions in time")
        if self._homeless_until is not None and now >= self._homeless_until:
            self._homeless_until = None
            self.inbound.settle_homeless()
        due = min(
            liveness.deadline(),
            self._restore_by,
            self._homeless_until or float("inf"),
            self._companion.tick(now) if self._ready else float("inf"),
        )
        return max(0.0, due - now)

    # -- the end of a connection --------------------------------------------------------------

    def _say_goodbye(self) -> None:
        deadline = self._leave_by
        assert deadline is not None
        transport = self.transport
        for packet in self.inbound.acknowledgements():
            transport.write(packet)
        self._outbound.pump(transport.write, transport.unsent_bytes)
        transport.disconnect(deadline)

    def _lost(self, reason: str) -> None:
        """Leave everything as the next connection needs it."""
        self._serving = self._ready = False
        bytes_in, bytes_out = self.transport.traffic
        self._bytes_in += bytes_in
        self._bytes_out += bytes_out
        self.transport.drop()
        self._outbound.disconnected()
        self._restoring.clear()
        self._subscribing.clear()
        for waiter in self._unsubscribing.values():
            waiter.set_result(None)
        self._unsubscribing.clear()
        for entry in self._registry.entries():
            # Registered all the same: the next connection asks for it.
            self._settle_waiters(entry, None)
        if self._leave_by is None:
            self.last_error = reason
            self._state.replace(ConnectionState.CONNECTED, ConnectionState.RECONNECTING)
            logger.warning("connection lost: %s", reason, extra=self._extra())
        else:
            logger.info("disconnected", extra=self._extra())

    def _extra(self) -> dict[str, object]:
        return {"client_id": self._config.client_id}


def _subscribe_error(refused: list[tuple[str, str]]) -> SubscribeError:
    listed = "; ".join(f"{topic_filter!r}: {reason}" for topic_filter, reason in refused)
    return SubscribeError(f"the broker refused {listed}; check the rules of the broker", refused)
