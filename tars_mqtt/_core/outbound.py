"""The way out: from the backlog to the broker's acknowledgement."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from tars_mqtt._core import wire
from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.event import LAST_PAHO_PACKET_ID, Connack
from tars_mqtt._core.outgoing import Outgoing
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.suspicion import Suspicion
from tars_mqtt.errors import PublishRejectedError

logger = logging.getLogger("tars_mqtt.publish")

_FIRST_PACKET_ID = LAST_PAHO_PACKET_ID + 1
_LAST_PACKET_ID = 65_535

_ENOUGH_UNSENT = 262_144
"""Bytes handed to the stream at a time; the rest stays here, where it is counted and bounded."""

_WIDE_WINDOW = 64
_SHORT_PATIENCE = 0.00008


class Outbound:
    """Sends what is in the backlog, and takes it out when the broker has it. Owned by the network thread.

    QoS 1 and 2 leave in the order of admission, at most a window of them unacknowledged, also
    after a reconnect: what was under way then goes to the front of the backlog again.
    """

    def __init__(
        self,
        backlog: Backlog,
        max_inflight: int,
        counters: Counters,
        client_id: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backlog = backlog
        self._max_inflight = max_inflight
        self._counters = counters
        self._client_id = client_id
        self._clock = clock
        self._inflight: dict[int, Outgoing] = {}
        self._repeated: set[int] = set()
        """Of the packet ids in flight, those that were in flight on a connection before."""
        self._packet_id = _FIRST_PACKET_ID - 1
        self._window = 0
        self._v5 = True
        self._limits = Connack(code=0, reason="", session_present=False)
        self._lossy_unsent = 0
        self.suspicion = Suspicion(clock)
        self.sent_count = 0
        self.acknowledged_count = 0

    @property
    def inflight(self) -> int:
        """How many messages are unacknowledged on the wire. Any thread."""
        return len(self._inflight)

    @property
    def patience(self) -> float:
        """For how many seconds acknowledgements may be left unread, so that the window does not run dry.

        While messages wait for others to be acknowledged, the broker should not run out of work: a window
        of few messages keeps it busy for less time than a short sleep takes.
        """
        if len(self._inflight) < self._window or not self._backlog.firm:
            return math.inf
        return _SHORT_PATIENCE if self._window >= _WIDE_WINDOW else 0.0

    def abandon(self) -> int:
        """Give up what is held; returns how many of QoS 1 and 2 there were. After the network thread."""
        in_flight = tuple(self._inflight.values())
        self._inflight.clear()
        firm, lossy = self._backlog.abandon(in_flight)
        if firm or lossy:
            self._counters.drop("shutdown", firm + lossy)
        return firm

    def connected(self, connack: Connack, v5: bool, resumed: bool) -> None:
        """A connection is there: send what waits, what was interrupted first.

        Args:
            resumed: The broker still has the session in which the interrupted messages were sent.
        """
        self._v5 = v5
        self._limits = connack
        self.suspicion.new_connection()
        self._window = min(self._max_inflight, connack.receive_maximum, _LAST_PACKET_ID - LAST_PAHO_PACKET_ID)
        interrupted = tuple(self._inflight.values())
        self._inflight.clear()
        self._repeated = {message.packet_id for message in interrupted} if resumed else set()
        self._backlog.connected(interrupted, resumed, connack, v5)

    def disconnected(self, by_broker: bool, cut_short: int = 0) -> None:
        """The connection is gone: QoS 0 that did not leave with it is lost, the rest stays.

        Args:
            by_broker: It was not we who gave it up.
            cut_short: How many messages of QoS 0 that a publisher had sent himself did not leave whole.
        """
        if by_broker:
            self._give_up(self.suspicion.hung_up(self._inflight.values()))
        lost = self._backlog.disconnected() + self._lossy_unsent + cut_short
        self._lossy_unsent = 0
        if lost:
            self._counters.drop("connection_lost", lost)
            logger.warning(
                "lost up to %d messages of QoS 0 with the connection",
                lost,
                extra={"client_id": self._client_id},
            )

    def _give_up(self, message: Outgoing | None) -> None:
        """Fail the message over which the broker hangs up, if there is one; those behind it go on."""
        if message is None:
            return
        del self._inflight[message.packet_id]
        self._reject(
            message,
            f"the broker closed the connection each of the {message.strikes} times that it was sent; "
            f"its {message.size:,} bytes are probably more than the broker allows",
        )

    def pump(self, write: Callable[[list[bytes]], None], unsent_bytes: int) -> bool:
        """Write what the window and the socket have room for; True when more could go right after."""
        if not unsent_bytes:
            self.all_sent()
        room = _ENOUGH_UNSENT - unsent_bytes
        backlog = self._backlog
        if room > 0 and backlog.lossy:
            # Half of it: neither kind starves the other.
            packets, size = backlog.take_lossy((room + 1) // 2)
            write(packets)
            self.sent_count += len(packets)
            self._lossy_unsent += len(packets)
            room -= size
        suspicion = self.suspicion
        packets = []
        size = 0
        while (
            size < room
            and backlog.firm
            and len(self._inflight) < self._window
            and suspicion.may_send(backlog.firm[0], bool(self._inflight))
        ):
            packet = self._packet(backlog.firm.popleft())
            if packet is not None:
                packets.append(packet)
                size += len(packet)
        if packets:
            write(packets)
        backlog.load_more()
        return room <= size or bool(backlog.lossy)

    def all_sent(self) -> None:
        """All that was written has left: no QoS 0 is lost with the connection any more."""
        self._lossy_unsent = 0

    def _packet(self, message: Outgoing) -> bytes | None:
        """What is to be sent of *message* now, if anything is."""
        if message.received:
            packet = wire.encode_ack(wire.PUBREL, message.packet_id)
        else:
            if not message.sent:
                if not message.receipt._mark_sent():
                    self._backlog.over(message)  # taken back in time
                    return None
                if reason := self._too_late(message):
                    self._reject(message, reason)
                    return None
                if message.properties is not None and not self._v5:
                    self._backlog.say_left_out()
                message.packet_id = self._next_packet_id()
            packet = wire.encode_publish(
                message.topic,
                message.payload,
                message.qos,
                message.retain,
                message.sent,
                message.packet_id,
                self._v5,
                b"" if message.properties is None else message.properties.at(self._clock()),
            )
            objection = self._limits.objection(message.qos, message.retain, len(packet))
            if objection:
                self._reject(message, objection)
                return None
            self.sent_count += 1
            if message.sent:
                self._counters.add("retried")
        message.sent = True
        if message.strikes:
            self.suspicion.sent(message)
        self._inflight[message.packet_id] = message
        return packet

    def _next_packet_id(self) -> int:
        packet_id = self._packet_id
        while True:
            packet_id = packet_id + 1 if packet_id < _LAST_PACKET_ID else _FIRST_PACKET_ID
            if packet_id not in self._inflight:
                self._packet_id = packet_id
                return packet_id

    def _too_late(self, message: Outgoing) -> str | None:
        """Why *message* is not worth sending any more, if it is not."""
        if message.stored is not None and self._backlog.too_old(message):
            return "it waited in the outbox for longer than outbox_max_age"
        if message.properties is not None and message.properties.expired(self._clock()):
            return "its message_expiry_interval was over before it could be sent"
        return None

    def _reject(self, message: Outgoing, reason: str, code: int | None = None) -> None:
        """Fail *message*, which is not on its way any more."""
        self._backlog.over(message)
        self._counters.add("rejected")
        topic = message.topic.decode()
        logger.warning(
            "a message to %r was rejected: %s",
            topic,
            reason,
            extra={
                "client_id": self._client_id,
                "topic": topic,
                "qos": message.qos,
                "envelope_id": message.receipt.envelope_id,
            },
        )
        message.receipt._fail(
            PublishRejectedError(f"the message to {topic!r} was rejected: {reason}", reason=reason, code=code)
        )

    def acknowledged(self, kind: int, packet_id: int, reason: int) -> bytes | None:
        """Take PUBACK, PUBREC or PUBCOMP; returns the packet that answers it, if one does."""
        message = self._inflight.get(packet_id)
        if kind == wire.PUBREC:
            return self._received(message, packet_id, reason)
        if message is None or kind != (wire.PUBACK if message.qos == 1 else wire.PUBCOMP):
            return None  # repeated, or of a session that is gone
        # PUBCOMP never refuses: "not found" says that the broker had seen the release already (section 4.3.3).
        self._settle(message, reason if kind == wire.PUBACK else 0)
        return None

    def _received(self, message: Outgoing | None, packet_id: int, reason: int) -> bytes | None:
        if message is None or message.qos != 2:
            return (
                wire.encode_ack_reason(wire.PUBREL, packet_id, wire.PACKET_IDENTIFIER_NOT_FOUND)
                if self._v5
                else wire.encode_ack(wire.PUBREL, packet_id)
            )
        # To a repetition, "in use" says that the broker has it, and waits for the release.
        had = reason == wire.PACKET_IDENTIFIER_IN_USE and packet_id in self._repeated
        if reason >= 0x80 and not had:
            self._settle(message, reason)
            return None
        message.received = True
        self.suspicion.acknowledged(message)
        return wire.encode_ack(wire.PUBREL, packet_id)

    def _settle(self, message: Outgoing, reason: int) -> None:
        del self._inflight[message.packet_id]
        self._repeated.discard(message.packet_id)
        self.suspicion.acknowledged(message)
        if reason >= 0x80:
            self._reject(message, wire.reason_name(reason), reason)
        else:
            self._backlog.over(message)
            self.acknowledged_count += 1
            message.receipt._settle()
