"""The story of the connection: get one, keep it, get the next."""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import Future
from typing import Protocol

from tars_mqtt._core import wire
from tars_mqtt._core.aside import Start
from tars_mqtt._core.backoff import Backoff
from tars_mqtt._core.connector import MQTT_5, Connection, Connector, curable
from tars_mqtt._core.event import (
    LAST_PAHO_PACKET_ID,
    Connack,
    Disconnect,
    Event,
    Packets,
    Suback,
    Unsuback,
    Will,
)
from tars_mqtt._core.inbound import Inbound
from tars_mqtt._core.ledger import Debt
from tars_mqtt._core.limit import Interrupted
from tars_mqtt._core.liveness import Liveness
from tars_mqtt._core.network import NetworkThread
from tars_mqtt._core.outbound import Outbound
from tars_mqtt._core.registry import FilterEntry, Registration, Registry
from tars_mqtt._core.state import TRYING, ConnectionState, StateCell
from tars_mqtt._core.stream import ConnectionLostError, HungUpError, SilenceError
from tars_mqtt._core.subscriber import Departure, Subscriber
from tars_mqtt._core.transport import Transport
from tars_mqtt.config import MQTTClientConfig
from tars_mqtt.errors import ClosedError, ConfigError, ConnectError, ConnectRefusedError
from tars_mqtt.url import BrokerURL

logger = logging.getLogger("tars_mqtt.session")

_TAKEN_OVER = 0x8E
_SHORT_TIME = 60.0
"""Seconds; connections that are hung up sooner, again and again, look like a quarrel over the client id."""
_PACKET_IDS = 65_535
_MOST_UNSENT_PACKETS = 4 * _PACKET_IDS
"""More than the window, what `Outbound` writes ahead and all acknowledgements can come to: a broker that
asks for more answers and reads none must not fill our memory."""
_SUSPECT_AGAIN = 0.05
"""Seconds until a duty is looked at again that is due, and could not be done."""
_PAUSED_LOOK = 1.0
"""Seconds between two looks at a connection that is not read."""


class Companion(Protocol):
    """What goes along with a connection: health and heartbeat. Called on the network thread."""

    def will(self) -> Will | None:
        """The last will for the next connection."""

    def ready(self, first: bool) -> None:
        """The connection is up and the subscriptions are acknowledged."""

    def tick(self, now: float) -> float:
        """Do what is due; return when to be called again, on the monotonic clock."""


class TakenOverError(ConnectionLostError):
    """Another client connected with our id [MQTT-3.1.4-3]."""


class Session:
    """What the network thread does. Everything but the methods in the first group runs on it."""

    def __init__(
        self,
        config: MQTTClientConfig,
        transport: Transport,
        state: StateCell,
        registry: Registry,
        inbound: Inbound,
        outbound: Outbound,
        companion: Companion,
        start_call: Start | None = None,
    ) -> None:
        self._config = config
        self._state = state
        self.inbound = inbound
        self._outbound = outbound
        self._companion = companion
        self.transport = transport
        self._connector = Connector(config, self.transport, companion.will, start_call)
        self._subscriber = Subscriber(registry, self.transport, config.client_id)
        # Any thread:
        self.thread = NetworkThread(transport, config.client_id)
        self.last_error: str | None = None
        self.ping_round_trip: float | None = None
        self.connections = 0
        # Owned by the network thread:
        self._first: Future[None] = Future()
        self._wanted_by = math.inf
        self._backoff = Backoff(config.reconnect_min_delay, config.reconnect_max_delay)
        self._bytes_in = 0
        self._bytes_out = 0
        self._broker: BrokerURL | None = None
        self._v5 = True
        self._hang_ups = 0
        self._ready = False
        self._was_ready = False
        """Whether any connection so far has become ready."""
        self._broker_talks = False
        self._liveness = Liveness(1.0, 1.0, 0.0, 0.0)
        self._restore_by = math.inf

    # -- any thread -------------------------------------------------------------------------

    def start(self, wanted_by: float) -> Future[None]:
        """Start the network thread; the future tells how the first connection came out.

        Args:
            wanted_by: See `Connector.connect`.
        """
        self._first = first = Future[None]()
        self._wanted_by = wanted_by
        self._backoff.reset()
        self._subscriber.start()
        self.thread.start(self._run)
        return first

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes read and written, over all connections."""
        bytes_in, bytes_out = self.transport.traffic
        return self._bytes_in + bytes_in, self._bytes_out + bytes_out

    def subscribe(self, entry: FilterEntry, registration: Registration, waiter: Future[None]) -> None:
        """Have the broker asked for a filter; *waiter* is told the answer."""
        self.thread.call(lambda: self._subscribe(entry, registration, waiter))

    def unsubscribe(self, entry: FilterEntry, waiter: Future[bool]) -> None:
        """Have the broker told that a filter is not needed any more; *waiter* is told whether it has answered."""
        self.thread.call(lambda: self._subscriber.unsubscribe(entry, waiter))

    def leave_shared(self) -> Departure | None:
        """Unsubscribe from shared filters until the next start; None where there are none."""
        departure = Departure({each: Future[bool]() for each in self._subscriber.shared_filters()})
        if not departure.answers:
            return None
        self.thread.call(lambda: self._leave_shared(departure))
        return departure

    def owed_to_groups(self) -> Future[Debt | None]:
        """See `Inbound.owed_to_groups`; None where there is no connection on which to settle it."""
        owed = Future[Debt | None]()
        self.thread.call(
            lambda: owed.set_result(self.inbound.owed_to_groups if self._subscriber.has_connection else None)
        )
        return owed

    def forget(self, entry: FilterEntry) -> None:
        """While there is no network thread: have the broker told of it on the next connection."""
        self._subscriber.forget(entry)

    # -- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self.thread.leave_by is None:
                try:
                    delay = self._one_connection()
                except Interrupted:
                    break
                except Exception as error:
                    # A bug of ours costs one connection, not the service.
                    logger.exception(
                        "internal error on the network thread; reconnecting", extra=self._extra()
                    )
                    delay = self._failed(ConnectError(f"internal error: {error!r}"))
                self._wait(delay)
        finally:
            self.transport.close()
            self.thread.run_commands()
            for state in TRYING:
                self._state.replace(state, ConnectionState.DISCONNECTED)  # nobody tries any more
            self._settle_first(ClosedError("the client was shut down while it connected"))

    def _one_connection(self) -> float:
        """Connect and serve until the connection is lost; returns the delay before the next."""
        try:
            connection = self._connector.connect(self._interrupted, self._wanted_by)
        except ConnectRefusedError as error:
            # A function for credentials may have others the next time; whoever waits in connect() is told.
            may_change = self._config.credentials is not None and self._first.done()
            return self._failed(error, error.retriable or may_change)
        except (ConnectError, ConfigError) as error:
            return self._failed(error, curable(error))
        started = time.monotonic()
        end: Exception | None = None
        try:
            self._established(connection)
            self._serve(connection.events)
        except Exception as error:
            end = error
            if not isinstance(error, (ConnectionLostError, wire.MalformedPacketError)):
                raise
        finally:
            held = time.monotonic() - started
            self._lost(end, held)
        return self._delay_after(held, taken_over=isinstance(end, TakenOverError))

    def _failed(self, error: Exception, is_curable: bool = True) -> float:
        self.transport.drop()
        self.last_error = str(error)
        if not is_curable and self._settle_first(error):
            self.thread.interrupt()
            return 0.0
        delay = self._backoff.next() if is_curable else self._backoff.longest()
        logger.log(
            logging.WARNING if is_curable else logging.ERROR,
            "%s; next attempt in %.1f s",
            error,
            delay,
            extra=self._extra() | {"attempt": self._backoff.attempt, "delay": round(delay, 3)},
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

    def _delay_after(self, held: float, taken_over: bool) -> float:
        """How long to wait after a connection of that many seconds."""
        if taken_over:
            return self._backoff.longest()
        if held > max(self._backoff.ceiling, 1.0):
            self._backoff.reset()
        return self._backoff.next()

    def _wait(self, delay: float) -> None:
        until = time.monotonic() + delay
        while True:
            self.transport.acknowledge_wake()  # before all looks, or the wake between would be slept through
            self.thread.run_commands()
            now = time.monotonic()
            if now >= until or self.thread.leave_by is not None:
                return
            self.transport.sleep(until - now)

    def _interrupted(self) -> bool:
        """Asked again and again while a connection is being made, which may take long: others need not wait for it."""
        self.thread.run_commands()
        return self.thread.leave_by is not None

    # -- a connection begins ------------------------------------------------------------------

    def _established(self, connection: Connection) -> None:
        now = time.monotonic()
        config, connack = self._config, connection.connack
        self._v5 = connection.version == MQTT_5
        self.connections += 1
        # A session of another broker, or of an earlier process, is not the one that we know.
        resumed = connack.session_present and connection.url == self._broker
        self._broker = connection.url
        self._broker_talks = connack.session_present
        keepalive = float(connack.keepalive or config.keepalive)
        patience = 1.5 * keepalive
        if config.enable_heartbeat:
            patience = min(patience, 3 * config.heartbeat_interval)
        self._liveness = Liveness(keepalive, patience, now, now)
        self._restore_by = now + config.connect_timeout
        self.inbound.new_connection(self._v5, resumed, connack.session_present and not resumed, now)
        # First the subscriptions: what is published on them by ourselves must find them.
        self._subscriber.connected(connack, resumed)
        self._outbound.connected(connack, self._v5, resumed)
        logger.info(
            "connected to %s with MQTT %s, %s session",
            connection.url,
            "5" if self._v5 else "3.1.1",
            "resumed" if connack.session_present else "new",
            extra=self._extra(),
        )
        self._ready_if_restored()

    def _ready_if_restored(self) -> None:
        if self._ready or not self._subscriber.restored:
            return
        self._ready = True
        self._restore_by = math.inf
        for state in TRYING:  # and not out of a shutdown
            self._state.replace(state, ConnectionState.CONNECTED)
        if self._state.value is ConnectionState.CONNECTED:
            first, self._was_ready = not self._was_ready, True
            self._companion.ready(first)
        self._settle_first(self._subscriber.take_refusals())

    # -- it goes on ---------------------------------------------------------------------------

    def _serve(self, events: list[Event]) -> None:
        """Move packets until the connection is lost or the client leaves."""
        transport, inbound, outbound = self.transport, self.inbound, self._outbound
        while True:
            for event in events:
                self._on(event)
            transport.acknowledge_wake()
            if self.thread.leave_by is not None:
                break
            self.thread.run_commands()
            transport.write_all(inbound.acknowledgements())
            more = outbound.pump(transport.write_all, transport.unsent_bytes)
            events = transport.poll(self._until_next_duty(), more, outbound.patience)
        self._leave()

    def _on(self, event: Event) -> None:
        match event:
            case Packets(packets):
                self._on_packets(packets)
            case Suback():
                self._subscriber.on_suback(event)
                self._ready_if_restored()
            case Unsuback():
                self._subscriber.on_unsuback(event)
            case Disconnect(code, reason):
                if code == _TAKEN_OVER:
                    name = self._config.client_id
                    raise TakenOverError(f"taken over by another client with the same id {name!r}")
                raise ConnectionLostError(f"the broker ended the connection: {reason}")
            case Connack():
                raise ConnectionLostError("the broker sent a second CONNACK")

    def _on_packets(self, packets: list[tuple[int, bytes]]) -> None:
        self._broker_talks = True
        inbound = self.inbound
        for first, body in packets:
            kind = first & 0xF0
            if kind == wire.PUBLISH:
                inbound.on_publish(first, body)
            elif kind == wire.PINGRESP:
                self._on_pingresp()
            elif kind == wire.PASSED_OVER:
                inbound.on_passed_over(first, body)
            else:
                self._on_acknowledgement(kind, first, body)
        inbound.hand_over()

    def _on_acknowledgement(self, kind: int, first: int, body: bytes) -> None:
        packet_id, reason = wire.decode_ack(body, self._v5)
        if first == wire.PUBREL:
            answer = self.inbound.on_pubrel(packet_id)
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
        self._outbound.suspicion.answered()
        if asked is not None:
            self.ping_round_trip = time.monotonic() - asked

    def _leave_shared(self, departure: Departure) -> None:
        inbound = self.inbound
        if self._subscriber.has_connection:
            # Acknowledgements first: what the broker sends in return comes before its answer.
            self.transport.write_all(inbound.acknowledgements())
        inbound.count_shared()
        departure.owed, departure.arrived = inbound.owed_to_groups, inbound.shared_arrived
        self._subscriber.leave_shared(departure)

    def _subscribe(self, entry: FilterEntry, registration: Registration, waiter: Future[None]) -> None:
        self.inbound.subscribed(time.monotonic())
        self._subscriber.subscribe(entry, registration, waiter)

    def _until_next_duty(self) -> float:
        """Do what is due; return how many seconds may pass before the next look."""
        now = time.monotonic()
        liveness = self._liveness
        liveness.note(now, self.transport.signs_of_life, self.transport.traffic[1])
        if self.transport.unsent_packets > _MOST_UNSENT_PACKETS:
            raise ConnectionLostError("the broker does not read the answers to what it sends")
        look_again = self._pause_if_congested(now)
        if liveness.ping_due(now) or (self._outbound.suspicion.wants_answer and liveness.asked is None):
            self.transport.write(wire.PINGREQ_PACKET)
            liveness.asked = now
        silence = liveness.overdue(now)
        if silence is not None:
            if liveness.suspected:
                raise SilenceError(f"no sign of life from the broker for {silence:.1f} s")
            # The thread may have been held up itself: one more look at the socket first.
            liveness.suspected = True
            return 0.0
        if now >= self._restore_by:
            raise ConnectionLostError("the broker did not acknowledge the subscriptions in time")
        suspicious = self._outbound.suspicion.look_again_at
        if suspicious <= now:
            suspicious = now + _SUSPECT_AGAIN  # there is no room to go on with it
        due = min(liveness.deadline(), self._restore_by, self.inbound.tick(now), suspicious, look_again)
        if self._ready:
            due = min(due, self._companion.tick(now))
        return max(0.0, due - now)

    def _pause_if_congested(self, now: float) -> float:
        """Stop reading, or go on; returns when to look again at a connection that is not read."""
        congested = self._congested()
        self.transport.pause(congested)
        if not congested:
            return math.inf
        self._liveness.excuse(now)
        if self.transport.peer_closed:
            raise HungUpError("the broker closed the connection")
        return now + _PAUSED_LOOK

    def _congested(self) -> bool:
        """Whether handlers are so far behind that no more is read.

        A broker of MQTT 5 knows our Receive Maximum and stops before, so that the rest goes on; it is held
        back only where it does not keep to it. While the broker owes answers, reading goes on: what would end the
        congestion may be an acknowledgement that a handler, or a dead letter, waits for. Then the packet ids that
        there are bound what is held.
        """
        unacknowledged = self.inbound.unacknowledged
        most = self._config.max_pending
        owed = self._outbound.inflight or self._subscriber.waits
        if owed or not (self._v5 or self._subscriber.restored):
            most = _PACKET_IDS
        if self._v5:
            return unacknowledged > min(most, _PACKET_IDS)
        return unacknowledged >= most

    # -- it ends ------------------------------------------------------------------------------

    def _leave(self) -> None:
        transport = self.transport
        thread = self.thread

        def left() -> float:
            """It may be moved forward meanwhile."""
            return (thread.leave_by or 0.0) - time.monotonic()

        transport.write_all(self.inbound.last_acknowledgements())
        while self._outbound.pump(transport.write_all, transport.unsent_bytes):
            if not transport.flush(left):
                break
        owed = self._broker_talks or self._outbound.inflight > 0 or self._liveness.asked is not None
        if transport.disconnect(left, owed):
            self._outbound.all_sent()

    def _lost(self, error: Exception | None, held: float) -> None:
        """Leave everything as the next connection needs it."""
        self._ready = False
        bytes_in, bytes_out = self.transport.traffic
        self._bytes_in += bytes_in
        self._bytes_out += bytes_out
        cut_short = self.transport.drop()
        by_broker = error is not None and not isinstance(error, SilenceError)
        self._outbound.disconnected(by_broker, cut_short)
        self._subscriber.disconnected()
        if error is None:
            logger.info("disconnected", extra=self._extra())
        else:
            self.last_error = str(error) + self._quarrel(error, held)
            self._state.replace(ConnectionState.CONNECTED, ConnectionState.RECONNECTING)
            logger.warning("connection lost: %s", self.last_error, extra=self._extra())

    def _quarrel(self, error: Exception, held: float) -> str:
        """Mosquitto, and brokers of MQTT 3.1.1, hang up without a word when another client takes our id."""
        suspect = isinstance(error, HungUpError) and held < _SHORT_TIME
        self._hang_ups = self._hang_ups + 1 if suspect else 0
        if self._hang_ups < 2:
            return ""
        name = self._config.client_id
        return f" again: does it restart, or was it taken over by another client with the same id {name!r}?"

    def _extra(self) -> dict[str, object]:
        return {"client_id": self._config.client_id}
