"""The way out: from a caller's message to the broker's acknowledgement."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from tars_mqtt._core import wire
from tars_mqtt._core.outgoing import Outgoing, left_in_outbox
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.suspicion import Suspicion
from tars_mqtt._core.transport import LAST_PAHO_PACKET_ID, Connack
from tars_mqtt.errors import (
    ClosedError,
    NotConnectedError,
    OutboxError,
    PublishRejectedError,
    QueueFullError,
)

if TYPE_CHECKING:
    from tars_mqtt._core.spool import Spool

logger = logging.getLogger("tars_mqtt.publish")

_FIRST_PACKET_ID = LAST_PAHO_PACKET_ID + 1
_LAST_PACKET_ID = 65_535

_LARGEST_BYTES = wire.MAX_REMAINING_LENGTH - 5
"""Of topic and payload: two lengths and a packet id go with them in a PUBLISH."""

_ENOUGH_UNSENT = 262_144
"""Bytes handed to the stream at a time; the rest stays here, where it is counted and bounded."""


class Outbound:
    """Holds outgoing messages until the broker has them.

    QoS 1 and 2 leave in the order of admission, at most a window of them unacknowledged, also
    after a reconnect: what was under way then goes to the front of the queue again.
    """

    def __init__(
        self,
        max_inflight: int,
        max_queued: int,
        max_queued_bytes: int,
        counters: Counters,
        wake: Callable[[], None],
        client_id: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client_id = client_id
        self._max_inflight = max_inflight
        self._max_queued = max_queued
        self._max_queued_bytes = max_queued_bytes
        self._counters = counters
        self._wake = wake
        self._spool: Spool | None = None
        self._spool_most = self._spool_most_bytes = 0
        # Owned by the network thread:
        self._inflight: dict[int, Outgoing] = {}
        self._packet_id = _FIRST_PACKET_ID - 1
        self._window = 0
        self._v5 = True
        self._limits = Connack(code=0, reason="", session_present=False)
        self._lossy_unsent = 0
        self.suspicion = Suspicion(clock)
        self.messages = 0
        self.acknowledgements = 0
        # Guarded by _lock; the queues are also taken from, at their left end, by the network thread:
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting = 0
        self._callbacks: deque[Callable[[], None]] = deque()
        self._firm: deque[Outgoing] = deque()
        self._lossy: deque[Outgoing] = deque()
        self._lossy_bytes = 0
        self._held = 0
        self._held_bytes = 0
        self._online = False
        self._refusal: Exception | None = None

    # -- any thread -------------------------------------------------------------------------

    @property
    def depths(self) -> tuple[int, int, int]:
        """Messages held, their bytes, and how many of them are unacknowledged on the wire."""
        return self._held, self._held_bytes, len(self._inflight)

    @property
    def durable(self) -> bool:
        """Whether there is an outbox."""
        return self._spool is not None

    @property
    def online(self) -> bool:
        """Whether there is a connection to send on."""
        return self._online

    def admit_first(self, message: Outgoing) -> None:
        """Take a message ahead of all others and beyond the bounds. Does not block."""
        with self._room:
            self._firm.appendleft(message)
            self._held += 1
            self._held_bytes += message.size
        self._wake()

    def admit(self, message: Outgoing, timeout: float | None, wait_stored: bool = True) -> None:
        """Take a message, or refuse it before anything is sent.

        Args:
            message: What to send; its topic and payload are checked already.
            timeout: Seconds to wait for room; None waits for ever, 0 not at all.
            wait_stored: Return when an outbox has it on disk. Otherwise it gets there before it is sent, and
                its receipt fails if it does not: for a caller that may not block, and awaits the receipt.

        Raises:
            NotConnectedError: QoS 0 without a connection.
            ClosedError: The client was shut down.
            QueueFullError: No room came free in time.
            PublishRejectedError: No packet can carry it.
        """
        size = len(message.topic) + len(message.payload)
        if size > _LARGEST_BYTES:
            raise PublishRejectedError(
                f"the message of {size:,} bytes is larger than MQTT can carry, which is {_LARGEST_BYTES:,}: "
                "send it in parts",
                reason="packet too large",
            )
        with self._lock:  # not the condition around it, which is slower to enter
            spool = self._spool if message.qos else None
            if not self._fits(message.qos, size):
                self._await_room(message, size, timeout)
            if self._refusal is not None:
                raise _fresh(self._refusal)
            if not message.qos:
                if not self._online:
                    raise _offline()
                self._lossy.append(message)
                self._lossy_bytes += size
            elif spool is None:
                self._firm.append(message)
            self._held += 1
            self._held_bytes += size
        if spool is not None:
            if not wait_stored:
                spool.store_soon(message, self._stored_late, self._not_stored)
                return
            try:
                spool.store(message, self._stored)
            except OutboxError:
                self._freed(1, size)
                raise
        self._wake()

    def _stored(self, message: Outgoing) -> None:
        """A message is on disk: queue it, unless others that are only there come first."""
        with self._room:
            spool = self._spool
            if spool is not None and spool.stays_in_memory(message, len(self._firm)):
                self._firm.append(message)
        if spool is None:
            message.receipt._fail(left_in_outbox())

    def _stored_late(self, message: Outgoing) -> None:
        self._stored(message)
        self._wake()

    def _not_stored(self, message: Outgoing, error: OutboxError) -> None:
        self._freed(1, message.size)
        message.receipt._fail(error)

    def _fits(self, qos: int, size: int) -> bool:
        """Whether there is room for a message. Holds the lock."""
        if self._spool is None:
            return self._held < self._max_queued and self._held_bytes + size <= self._max_queued_bytes
        if qos:
            return self._held < self._spool_most and self._held_bytes + size <= self._spool_most_bytes
        # The backlog on disk is no reason to refuse what takes up memory for a moment.
        return len(self._lossy) < self._max_queued and self._lossy_bytes + size <= self._max_queued_bytes

    def _await_room(self, message: Outgoing, size: int, timeout: float | None) -> None:
        """Holds the lock, and gives it away while it waits."""

        def room_or_refused() -> bool:
            return (
                self._fits(message.qos, size)
                or self._refusal is not None
                or (not message.qos and not self._online)
            )

        if size > (self._spool_most_bytes if self._spool and message.qos else self._max_queued_bytes):
            raise QueueFullError(
                f"the message of {size:,} bytes is larger than all that may be held: "
                "raise max_queued_bytes, or outbox_max_bytes where there is an outbox",
                retriable=False,
            )
        self._waiting += 1
        try:
            if not self._room.wait_for(room_or_refused, timeout):
                raise QueueFullError(
                    f"{self._held:,} outgoing messages with {self._held_bytes:,} bytes are held already: "
                    "publish slower, or raise max_queued or max_queued_bytes (outbox_max_messages or "
                    "outbox_max_bytes where there is an outbox)"
                )
        finally:
            self._waiting -= 1

    def when_room(self, callback: Callable[[], None]) -> None:
        """Have *callback* called once, when it is worth trying again; for whoever may not block."""
        with self._room:
            self._callbacks.append(callback)

    def never_mind(self, callback: Callable[[], None]) -> None:
        """Undo `when_room`; where the call has come already, it goes to the next in line."""
        try:
            self._callbacks.remove(callback)
        except ValueError:
            self._call_back(1)

    def _call_back(self, most: int) -> None:
        """One callback for each message that left: no stampede for the same room."""
        with contextlib.suppress(IndexError):  # another thread may take the last one
            for _ in range(most):
                self._callbacks.popleft()()

    def attach(self, spool: Spool, most: int, most_bytes: int) -> None:
        """Keep messages of QoS 1 and 2 in a durable outbox from now on, and send what lies there."""
        with self._room:
            self._spool = spool
            self._spool_most = most
            self._spool_most_bytes = most_bytes
            self._held += spool.on_disk_only
            self._held_bytes += spool.bytes_found

    def open(self) -> None:
        """Admit messages from now on."""
        with self._room:
            self._refusal = None

    def refuse(self, reason: Exception) -> None:
        """Admit nothing more."""
        with self._room:
            self._refusal = reason
            self._room.notify_all()
        self._call_back(len(self._callbacks))

    def wait_flushed(self, timeout: float) -> bool:
        """Wait until the broker has every message of QoS 1 and 2, and the network every other."""
        with self._room:
            self._waiting += 1
            try:
                return self._room.wait_for(lambda: not self._held, timeout)
            finally:
                self._waiting -= 1

    def abandon(self) -> int:
        """Give up what is held; returns how many of QoS 1 and 2 there were. After the network thread."""
        if self._spool is not None:
            self._spool.flush()
        with self._room:
            # What was taken back is done already.
            held = (*self._inflight.values(), *self._firm)
            lost = [message for message in held if not message.receipt.done()]
            lossy = len(self._lossy)
            spool, self._spool = self._spool, None
            self._inflight.clear()
            self._firm.clear()
            self._lossy.clear()
            self._held = self._held_bytes = self._lossy_bytes = 0
            self._room.notify_all()
        if spool is not None:
            spool.close()
            for message in lost:
                message.receipt._fail(left_in_outbox())
            lost = [message for message in lost if message.stored is None]
        for message in lost:
            message.receipt._fail(
                ClosedError("the client was shut down before the broker acknowledged the message")
            )
        if lost or lossy:
            self._counters.drop("shutdown", len(lost) + lossy)
        return len(lost)

    # -- network thread ---------------------------------------------------------------------

    def connected(self, connack: Connack, v5: bool, resumed: bool) -> None:
        """A connection is there: send what waits, what was interrupted first.

        Args:
            resumed: The broker still has the session in which the interrupted messages were sent.
        """
        self._v5 = v5
        self._limits = connack
        self.suspicion.new_connection()
        self._window = min(self._max_inflight, connack.receive_maximum, _LAST_PACKET_ID - LAST_PAHO_PACKET_ID)
        interrupted = list(self._inflight.values())
        self._inflight.clear()
        with self._room:
            self._firm.extendleft(reversed(interrupted))
            if not resumed:
                # The broker forgot: nothing of it is a repetition, and no release is awaited. Not only what
                # the last connection interrupted: an earlier one's may not have had its turn since.
                for message in self._firm:
                    message.sent = message.received = False
            self._online = True

    def disconnected(self, by_broker: bool) -> None:
        """The connection is gone: QoS 0 that did not leave with it is lost, the rest stays."""
        if by_broker:
            self._give_up(self.suspicion.hung_up(self._inflight.values()))
        with self._room:
            self._online = False
            lost = len(self._lossy)
            self._held -= lost
            self._held_bytes -= self._lossy_bytes
            self._lossy_bytes = 0
            self._lossy.clear()
            self._room.notify_all()
        self._call_back(len(self._callbacks))
        lost += self._lossy_unsent
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
        self._over(message)
        self._rejected(
            message,
            f"the broker closed the connection each of the {message.strikes} times that it was sent; "
            f"its {message.size:,} bytes are probably more than the broker allows",
            None,
        )

    def pump(self, write: Callable[[bytes], None], unsent_bytes: int) -> bool:
        """Write what the window and the socket have room for; True when more could go right after."""
        if not unsent_bytes:
            self._lossy_unsent = 0
        room = _ENOUGH_UNSENT - unsent_bytes
        if room > 0 and self._lossy:
            # Half of it: neither kind starves the other.
            room -= self._pump_lossy(write, (room + 1) // 2)
        suspicion = self.suspicion
        while (
            room > 0
            and self._firm
            and len(self._inflight) < self._window
            and suspicion.may_send(self._firm[0], bool(self._inflight))
        ):
            room -= self._send(self._firm.popleft(), write)
        if self._spool is not None and self._spool.wants_more(len(self._firm)):
            with self._room:
                self._spool.load(self._loaded)
        return room <= 0 or bool(self._lossy)

    def _loaded(self, messages: list[Outgoing]) -> None:
        """More of what is on disk. Timer thread."""
        with self._room:
            if self._spool is None:
                return
            self._firm.extend(messages)
            self._spool.entered(messages)
        self._wake()

    def _pump_lossy(self, write: Callable[[bytes], None], room: int) -> int:
        lossy, v5 = self._lossy, self._v5
        count = written = freed = 0
        rejected: list[tuple[Outgoing, str]] = []
        while lossy and written < room:
            message = lossy.popleft()
            freed += len(message.topic) + len(message.payload)
            count += 1
            packet = wire.encode_publish(message.topic, message.payload, 0, message.retain, False, 0, v5)
            objection = self._objection(message, len(packet))
            if objection:
                rejected.append((message, objection))
                continue
            write(packet)
            written += len(packet)
        self.messages += count - len(rejected)
        self._lossy_unsent += count - len(rejected)
        self._freed(count, freed, lossy=freed)
        for message, objection in rejected:
            self._rejected(message, objection, None)
        return written

    def _send(self, message: Outgoing, write: Callable[[bytes], None]) -> int:
        if message.received:
            packet = wire.encode_ack(wire.PUBREL, message.packet_id)
        else:
            if not message.sent:
                if not message.receipt._mark_sent():
                    self._over(message)  # taken back in time
                    return 0
                if self._spool is not None and self._spool.too_old(message):
                    self._over(message)
                    self._rejected(message, "it waited in the outbox for longer than outbox_max_age", None)
                    return 0
                message.packet_id = self._next_packet_id()
            packet = wire.encode_publish(
                message.topic,
                message.payload,
                message.qos,
                message.retain,
                message.sent,
                message.packet_id,
                self._v5,
            )
            objection = self._objection(message, len(packet))
            if objection:
                self._over(message)
                self._rejected(message, objection, None)
                return 0
            self.messages += 1
            if message.sent:
                self._counters.add("retried")
        message.sent = True
        self.suspicion.sent(message)
        self._inflight[message.packet_id] = message
        write(packet)
        return len(packet)

    def _next_packet_id(self) -> int:
        packet_id = self._packet_id
        while True:
            packet_id = packet_id + 1 if packet_id < _LAST_PACKET_ID else _FIRST_PACKET_ID
            if packet_id not in self._inflight:
                self._packet_id = packet_id
                return packet_id

    def _objection(self, message: Outgoing, packet_bytes: int) -> str | None:
        """Why this broker would end the connection over this message, if it would."""
        limits = self._limits
        if limits.maximum_packet_size is not None and packet_bytes > limits.maximum_packet_size:
            return (
                f"packet too large: {packet_bytes:,} bytes, the broker takes {limits.maximum_packet_size:,}"
            )
        if message.qos > limits.maximum_qos:
            return f"QoS not supported: the broker takes QoS {limits.maximum_qos} at most"
        if message.retain and not limits.retain_available:
            return "retain not supported by the broker"
        return None

    def _rejected(self, message: Outgoing, reason: str, code: int | None) -> None:
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
        expected = message is not None and (message.qos == 1) == (kind == wire.PUBACK)
        if message is None or not expected:
            return None  # repeated, or of a session that is gone
        self._settle(message, kind, reason)
        return None

    def _received(self, message: Outgoing | None, packet_id: int, reason: int) -> bytes | None:
        if message is None or message.qos != 2:
            not_found = 0x92
            return (
                wire.encode_ack_reason(wire.PUBREL, packet_id, not_found)
                if self._v5
                else wire.encode_ack(wire.PUBREL, packet_id)
            )
        if reason >= 0x80:
            self._settle(message, wire.PUBREC, reason)
            return None
        message.received = True
        self.suspicion.acknowledged(message)
        return wire.encode_ack(wire.PUBREL, packet_id)

    def _settle(self, message: Outgoing, kind: int, reason: int) -> None:
        del self._inflight[message.packet_id]
        self.suspicion.acknowledged(message)
        self._over(message)
        if reason >= 0x80:
            self._rejected(message, wire.reason_name(kind, reason), reason)
        else:
            self.acknowledgements += 1
            message.receipt._settle()

    def _over(self, message: Outgoing) -> None:
        """A message of QoS 1 or 2 needs nothing more."""
        if self._spool is not None:
            self._spool.discard(message)
        self._freed(1, message.size)

    def _freed(self, count: int, size: int, lossy: int = 0) -> None:
        with self._lock:
            self._held -= count
            self._held_bytes -= size
            self._lossy_bytes -= lossy
            if self._waiting:
                self._room.notify_all()
        if self._callbacks:
            self._call_back(count)


def _offline() -> NotConnectedError:
    return NotConnectedError(
        "there is no connection to the broker: a message of QoS 0 would be lost; "
        "publish with qos=1 to have it wait, or call wait_connected() first"
    )


def _fresh(error: Exception) -> Exception:
    """Each waiter gets its own instance."""
    return type(error)(*error.args)
