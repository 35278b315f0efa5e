"""The outgoing messages that wait for their turn: who may come in, and within which bounds."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from tars_mqtt._core import wire
from tars_mqtt._core.crowd import LARGE_BYTES, Crowd
from tars_mqtt._core.outgoing import Outgoing, left_in_outbox
from tars_mqtt._core.throttle import Throttle
from tars_mqtt.errors import (
    ClosedError,
    NotConnectedError,
    OutboxError,
    PublishRejectedError,
    QueueFullError,
    fresh,
)

if TYPE_CHECKING:
    from tars_mqtt._core.event import Connack
    from tars_mqtt._core.spool import Spool
    from tars_mqtt._core.stream import Stream

logger = logging.getLogger("tars_mqtt.publish")

_LARGEST_BYTES = wire.MAX_REMAINING_LENGTH - 7
"""Of topic, properties and payload: two lengths and a packet id go with them in a PUBLISH."""


class Backlog:
    """Holds outgoing messages from their admission until the broker has them, and counts them.

    Any thread puts in. The network thread takes out, QoS 1 and 2 at the left of `firm`, QoS 0 by `take_lossy`, and
    says when a message of the former is `over`, which makes room for another.
    """

    def __init__(
        self,
        max_queued: int,
        max_queued_bytes: int,
        wake: Callable[[], None],
        idle_stream: Callable[[], Stream | None] = lambda: None,
        client_id: str = "",
    ) -> None:
        self._client_id = client_id
        self._left_out = Throttle()
        self._max_queued = max_queued
        self._max_queued_bytes = max_queued_bytes
        self._wake = wake
        self._idle_stream = idle_stream
        self._spool: Spool | None = None
        self._spool_most = self._spool_most_bytes = 0
        self._retired: Spool | None = None
        # Guarded by _lock; `firm` is also taken from, at its left end, by the network thread:
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting = 0  # for room
        # Of all who were refused since nobody waited:
        self._short = False  # whether one lacked more than a place
        self._least: int | None = None  # size; 0 is for one who waits for other room than the rest
        self._smaller_may_fit = False  # than the one that was refused last, and may not block
        self._all_notified = self._all_called = True  # of what left last
        self._left = threading.Condition(self._lock)
        self._flushing = 0  # who waits for what is held to leave
        self._callbacks: deque[Callable[[], None]] = deque()
        self.firm: deque[Outgoing] = deque()
        """QoS 1 and 2."""
        self.lossy: deque[bytes] = deque()
        """QoS 0, as the packets that the connection of now is to send."""
        self._lossy_bytes = 0
        self.crowd = Crowd(self._lock)
        self.sent_at_once = 0
        """Messages of QoS 0 that never waited here."""
        self.held = 0
        """Messages that are not over, those on their way included."""
        self.held_bytes = 0
        self._limits: Connack | None = None
        """What the broker of the connection takes; None without one."""
        self._v5 = True
        self._refusal: Exception | None = None

    # -- any thread -------------------------------------------------------------------------

    @property
    def durable(self) -> bool:
        """Whether there is an outbox."""
        return self._spool is not None

    @property
    def online(self) -> bool:
        """Whether there is a connection to send on."""
        return self._limits is not None

    def admit_first(self, message: Outgoing) -> None:
        """Take a message ahead of all others and beyond the bounds. Does not block."""
        with self._room:
            self.firm.appendleft(message)
            self.held += 1
            self.held_bytes += message.size
        self._wake()

    def admit(self, message: Outgoing, timeout: float | None, wait_stored: bool = True) -> None:
        """Take a message of QoS 1 or 2, or refuse it before anything is sent.

        Args:
            message: What to send; its topic and payload are checked already.
            timeout: Seconds to wait for room; None waits for ever, 0 not at all.
            wait_stored: Return when an outbox has it on disk. Otherwise it gets there before it is sent, and
                its receipt fails if it does not: for a caller that may not block, and awaits the receipt.

        Raises:
            ClosedError: The client was shut down.
            QueueFullError: No room came free in time.
            PublishRejectedError: No packet can carry it.
        """
        size = message.size
        _check_size(size)
        with self._lock:  # not the condition around it, which is slower to enter
            spool = self._spool
            if not self._fits(message.qos, size):
                self._await_room(message.qos, size, timeout)
            if self._refusal is not None:
                raise fresh(self._refusal)
            if spool is None:
                self.firm.append(message)
            self.held += 1
            self.held_bytes += size
        if spool is not None:
            if not wait_stored:
                spool.store_soon(message, self._stored_late, partial(self._not_stored_late, spool))
                return
            try:
                spool.store(message, self._stored)
            except OutboxError as error:
                raise self._not_stored(spool, size, error) from error.__cause__
            except BaseException:  # Ctrl-C, as a rule
                if message.stored is None:
                    self._give_back(spool, size)
                else:
                    self._wake()  # it came when the message was on disk already
                raise
        self._wake()

    def admit_lossy(  # noqa: C901, PLR0912 - in one piece, because calls are what costs
        self,
        topic: bytes,
        payload: bytes,
        retain: bool,
        timeout: float | None,
        properties: bytes = b"",
        at_once: bool = True,
    ) -> None:
        """Take a message of QoS 0, or refuse it; see `admit`.

        Its packet is made here: it can leave on the connection of now alone, and the network thread, which
        serves all publishing threads, has less to do. Where that sleeps, and nothing is queued, it is sent here.

        Raises:
            NotConnectedError: There is no connection.
            ClosedError, QueueFullError: As in `admit`.
            PublishRejectedError: No packet can carry it, or the broker would not take it.
        """
        _check_size(len(topic) + len(payload) + len(properties))
        stream = None
        with self._lock:
            while True:
                if self._refusal is not None:
                    raise fresh(self._refusal)
                limits = self._limits
                if limits is None:
                    raise _offline()
                v5 = self._v5
                packet = wire.encode_publish(topic, payload, 0, retain, False, 0, v5, properties)
                size = len(packet)
                # Before the room: who waited for that, and then takes none, would leave the next one waiting.
                objection = limits.objection(0, retain, size)
                if objection is not None or self._fits(0, size):
                    break
                self._await_room(0, size, timeout)  # and look again: the connection may be another one
            if objection is None:
                if not self.lossy and at_once and size <= LARGE_BYTES:
                    # Under the lock it is the connection of these limits.
                    stream = self._idle_stream()
                if stream is None:
                    self.lossy.append(packet)
                    self._lossy_bytes += size
                    self.held += 1
                    self.held_bytes += size
                    if size > LARGE_BYTES:
                        self.crowd.grew(self._lossy_bytes)
        if objection is not None:
            raise PublishRejectedError(
                f"the message to {topic.decode()!r} was rejected: {objection}", reason=objection
            )
        if properties and not v5:
            self.say_left_out()
        if stream is None:
            self._wake()
            if self.crowd.there and timeout != 0 and size > LARGE_BYTES:
                self.crowd.wait()
        elif stream.send_now(packet):
            if stream.outgoing_bytes:
                self._wake()
            with self._lock:
                self.sent_at_once += 1
        else:
            self.admit_lossy(topic, payload, retain, timeout, properties, at_once=False)

    def say_left_out(self) -> None:
        """Warn that a message goes without its properties, for the connection speaks MQTT 3.1.1."""
        if count := self._left_out.admit():
            logger.warning(
                "sent %d messages without their properties: the broker speaks MQTT 3.1.1, which has none",
                count,
                extra={"client_id": self._client_id},
            )

    def joins_a_crowd(self) -> bool:
        """Whether the message that was just queued is a large one among many: worth a short wait."""
        with self._lock:
            return self.crowd.there and bool(self.lossy) and len(self.lossy[-1]) > LARGE_BYTES

    def _stored(self, message: Outgoing) -> None:
        """A message is on disk: queue it, unless others that are only there come first."""
        with self._room:
            spool = self._spool
            if spool is not None and spool.stays_in_memory(message, len(self.firm)):
                self.firm.append(message)
        if spool is None:
            message.receipt._fail(left_in_outbox())

    def _stored_late(self, message: Outgoing) -> None:
        self._stored(message)
        self._wake()

    def _not_stored(self, spool: Spool, size: int, error: OutboxError) -> Exception:
        """What to say of a message that was admitted, and could not be written by *spool*."""
        if not self._give_back(spool, size):
            return ClosedError("the client was shut down before the message was on disk")
        return fresh(error)

    def _give_back(self, spool: Spool, size: int) -> bool:
        """Free the room of a message that is not in *spool*; False when all that was held is given up already."""
        with self._lock:
            if self._spool is not spool:
                return False
            told = self._make_room(1, size)
        if self._callbacks:
            self._call_back(told)
        return True

    def _not_stored_late(self, spool: Spool, message: Outgoing, error: OutboxError) -> None:
        message.receipt._fail(self._not_stored(spool, message.size, error))

    def _fits(self, qos: int, size: int) -> bool:
        """Whether there is room for a message. Holds the lock."""
        if self._spool is None:
            return self.held < self._max_queued and self.held_bytes + size <= self._max_queued_bytes
        if qos:
            return self.held < self._spool_most and self.held_bytes + size <= self._spool_most_bytes
        # The backlog on disk is no reason to refuse what takes up memory for a moment.
        return len(self.lossy) < self._max_queued and self._lossy_bytes + size <= self._max_queued_bytes

    def _bounds(self) -> tuple[int, int]:
        """Of the number of messages, and of their bytes."""
        if self._spool is None:
            return self._max_queued, self._max_queued_bytes
        return self._spool_most, self._spool_most_bytes

    def _refused(self, qos: int, size: int) -> bool:
        """Keep in mind what did not fit in; whether a smaller one might that waits for its call. Holds the lock."""
        if self._spool is not None and not qos:
            size = 0  # who waits for memory and who waits for the disk stand in the same line
        self._least = size if self._least is None else min(self._least, size)
        self._short = self._short or not size or self.held_bytes + size > self._bounds()[1]
        return self._short and self._places() > 0

    def _places(self) -> int:
        """How many of the smallest that wait have room. Holds the lock."""
        most, most_bytes = self._bounds()
        return max(0, min(most - self.held, (most_bytes - self.held_bytes) // (self._least or 1)))

    def _await_room(self, qos: int, size: int, timeout: float | None) -> None:
        """Holds the lock, and gives it away while it waits."""

        def room_or_refused() -> bool:
            if self._fits(qos, size) or self._refusal is not None or (not qos and self._limits is None):
                return True
            smaller_may_fit = self._refused(qos, size)
            if timeout == 0:
                self._smaller_may_fit = self._smaller_may_fit or smaller_may_fit
            elif smaller_may_fit and not self._all_notified:
                self._all_notified = True
                self._room.notify_all()
            return False

        if size > (self._spool_most_bytes if self._spool and qos else self._max_queued_bytes):
            raise QueueFullError(
                f"the message of {size:,} bytes is larger than all that may be held: "
                "raise max_queued_bytes, or outbox_max_bytes where there is an outbox",
                retriable=False,
            )
        self._waiting += 1
        try:
            if not self._room.wait_for(room_or_refused, timeout):
                raise QueueFullError(
                    f"{self.held:,} outgoing messages with {self.held_bytes:,} bytes are held already: "
                    "publish slower, or raise max_queued or max_queued_bytes (outbox_max_messages or "
                    "outbox_max_bytes where there is an outbox)"
                )
        finally:
            self._waiting -= 1

    def when_room(self, callback: Callable[[], None]) -> None:
        """Have *callback* called once, when it is worth trying again; for whoever may not block."""
        self.pass_on()
        with self._room:
            self._callbacks.append(callback)

    def pass_on(self) -> None:
        """Somebody was refused, who may have been called: where a smaller one may fit in, all have a try."""
        with self._lock:
            tell = self._smaller_may_fit and not self._all_called
            self._smaller_may_fit = False
            self._all_called = self._all_called or tell
        if tell:
            self._call_back(len(self._callbacks))

    def never_mind(self, callback: Callable[[], None]) -> None:
        """Undo `when_room`; where the call has come already, it goes to the next in line."""
        try:
            self._callbacks.remove(callback)
        except ValueError:
            self._call_back(1)

    def _call_back(self, most: int) -> None:
        """One callback for each message that left, unless sizes matter: no stampede for the same place."""
        with contextlib.suppress(IndexError):  # another thread may take the last one
            for _ in range(most):
                self._callbacks.popleft()()

    def attach(self, spool: Spool, most: int, most_bytes: int) -> None:
        """Keep messages of QoS 1 and 2 in a durable outbox from now on, and send what lies there."""
        with self._room:
            self._spool = spool
            self._spool_most = most
            self._spool_most_bytes = most_bytes
            self.held += spool.on_disk_only
            self.held_bytes += spool.bytes_found

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
            self._flushing += 1
            try:
                return self._left.wait_for(lambda: not self.held, timeout)
            finally:
                self._flushing -= 1

    # -- network thread ---------------------------------------------------------------------

    def connected(self, interrupted: Iterable[Outgoing], resumed: bool, limits: Connack, v5: bool) -> None:
        """A connection is there: what was *interrupted* comes first again.

        Args:
            resumed: The broker still has the session in which it was sent.
            limits: What the broker takes.
            v5: Whether the connection speaks MQTT 5.
        """
        with self._room:
            self.firm.extendleft(reversed(tuple(interrupted)))
            if not resumed:
                # The broker forgot: nothing of it is a repetition, and no release is awaited. Not only what
                # the last connection interrupted: an earlier one's may not have had its turn since.
                for message in self.firm:
                    message.sent = message.received = False
            self._limits = limits
            self._v5 = v5

    def disconnected(self) -> int:
        """The connection is gone, and with it all of QoS 0; returns how many there were."""
        with self._room:
            self._limits = None
            lost = len(self.lossy)
            self.held -= lost
            self.held_bytes -= self._lossy_bytes
            self._lossy_bytes = 0
            self.crowd.shrank(0)
            self.lossy.clear()
            self._room.notify_all()
            self._left.notify_all()
        self._call_back(len(self._callbacks))
        self.crowd.tell()
        return lost

    def too_old(self, message: Outgoing) -> bool:
        """Whether *message* has waited in the outbox for too long."""
        return self._spool is not None and self._spool.too_old(message)

    def load_more(self) -> None:
        """Have more read of what is on disk, if memory runs low of it."""
        if self._spool is not None and self._spool.wants_more(len(self.firm)):
            with self._room:
                self._spool.load(partial(self._loaded, self._spool))

    def _loaded(self, spool: Spool, messages: list[Outgoing]) -> None:
        """More of what is on disk. Timer thread."""
        with self._room:
            ours = self._spool is spool
            if ours:
                self.firm.extend(messages)
                spool.entered(messages)
        if ours:
            self._wake()
            return
        for message in messages:  # a shutdown came meanwhile
            spool.leave(message)

    def over(self, message: Outgoing) -> None:
        """A message of QoS 1 or 2 needs nothing more."""
        if self._spool is not None:
            self._spool.discard(message)
        self._free(1, message.size)

    def take_lossy(self, most: int) -> tuple[list[bytes], int]:
        """Remove packets of QoS 0, about *most* bytes of them; returns them and how many bytes they are."""
        lossy = self.lossy
        with self._lock:
            if self._lossy_bytes <= most:
                packets, size = list(lossy), self._lossy_bytes
                lossy.clear()
            else:
                packets, size = [], 0
                while lossy and size < most:
                    packets.append(lossy.popleft())
                    size += len(packets[-1])
            self._lossy_bytes -= size
            self.crowd.shrank(self._lossy_bytes)
        self._free(len(packets), size)
        self.crowd.tell()
        return packets, size

    def _free(self, count: int, size: int) -> None:
        with self._lock:
            told = self._make_room(count, size)
        if self._callbacks:
            self._call_back(told)

    def _make_room(self, count: int, size: int) -> int:
        """Returns how many of those who may not block are to be called. Holds the lock."""
        before = self._places() if self._short else 0
        self.held -= count
        self.held_bytes -= size
        told = count  # each place for one, while no one lacks bytes
        if self._waiting or self._callbacks:
            if self._short:
                line = max(self._waiting, len(self._callbacks))
                told = max(count, self._places() - before) if self._least else line
            self._all_notified = told >= self._waiting
            self._all_called = told >= len(self._callbacks)
            self._room.notify(told)
        else:
            self._short = False
            self._least = None
        if self._flushing and not self.held:
            self._left.notify_all()
        return told

    # -- after the network thread -----------------------------------------------------------

    def abandon(self, in_flight: Iterable[Outgoing]) -> tuple[int, int]:
        """Give up what is held, *in_flight* included; returns how many of QoS 1 and 2, and of QoS 0, are lost.

        An outbox stays open for what the handlers have handled; `close_outbox` is the end of it.
        """
        if self._spool is not None:
            self._spool.flush()
        with self._room:
            held = (*in_flight, *self.firm)
            lossy = len(self.lossy)
            spool, self._spool = self._spool, None
            self.firm.clear()
            self.lossy.clear()
            self.held = self.held_bytes = self._lossy_bytes = 0
            self.crowd.shrank(0)
            self._room.notify_all()
            self._left.notify_all()
        self.crowd.tell()
        # What was taken back is done already.
        lost = [message for message in held if message.stored is None and not message.receipt.done()]
        if spool is not None:
            self._retired = spool
            spool.retire()
            for message in held:
                if message.stored is not None:
                    spool.leave(message)
        for message in lost:
            message.receipt._fail(
                ClosedError("the client was shut down before the broker acknowledged the message")
            )
        return len(lost), lossy

    def close_outbox(self) -> None:
        """Let go of the outbox that was given up, if there is one."""
        spool, self._retired = self._retired, None
        if spool is not None:
            spool.close()


def _check_size(size: int) -> None:
    """Refuse what no packet can carry, of so many bytes in topic and payload."""
    if size > _LARGEST_BYTES:
        raise PublishRejectedError(
            f"the message of {size:,} bytes is larger than MQTT can carry, which is {_LARGEST_BYTES:,}: "
            "send it in parts",
            reason="packet too large",
        )


def _offline() -> NotConnectedError:
    return NotConnectedError(
        "there is no connection to the broker: a message of QoS 0 would be lost; "
        "publish with qos=1 to have it wait, or call wait_connected() first"
    )
