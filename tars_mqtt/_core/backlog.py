"""The outgoing messages that wait for their turn: who may come in, and in which order they leave."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from tars_mqtt._core import wire
from tars_mqtt._core.bounds import Bounds
from tars_mqtt._core.crowd import LARGE_BYTES, Crowd
from tars_mqtt._core.outgoing import Outgoing, left_in_outbox
from tars_mqtt._core.throttle import Throttle
from tars_mqtt.errors import (
    ClosedError,
    NotConnectedError,
    OutboxError,
    PublishRejectedError,
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
        self._wake = wake
        self._idle_stream = idle_stream
        self._spool: Spool | None = None
        self._retired: Spool | None = None
        # Guarded by _lock; `firm` is also taken from, at its left end, by the network thread:
        self._lock = threading.Lock()
        self._memory = Bounds(self._lock, max_queued, max_queued_bytes, ("max_queued", "max_queued_bytes"))
        self._firm_bounds = self._memory  # those of the outbox, where there is one
        self._left = threading.Condition(self._lock)
        self._flushing = 0  # who waits for what is held to leave
        self.firm: deque[Outgoing] = deque()
        """QoS 1 and 2."""
        self.lossy: deque[bytes] = deque()
        """QoS 0, as the packets that the connection of now is to send."""
        self._lossy_bytes = 0
        self.crowd = Crowd(self._lock)
        self.sent_at_once = 0
        """Messages of QoS 0 that never waited here."""
        self._limits: Connack | None = None
        """What the broker of the connection takes; None without one."""
        self._v5 = True
        self._refusal: Exception | None = None

    # -- any thread -------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Messages that are not over, those on their way included."""
        memory, firm = self._memory, self._firm_bounds
        return memory.held if firm is memory else memory.held + firm.held

    @property
    def held_bytes(self) -> int:
        """Bytes of those."""
        memory, firm = self._memory, self._firm_bounds
        return memory.held_bytes if firm is memory else memory.held_bytes + firm.held_bytes

    def bounds(self, qos: int) -> Bounds:
        """What a message waits for that was refused with `QueueFullError`."""
        return self._firm_bounds if qos else self._memory

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
        with self._lock:
            self.firm.appendleft(message)
            self._firm_bounds.take(message.size)
        self._wake()

    def admit(
        self, message: Outgoing, timeout: float | None, wait_stored: bool = True, durable: bool = True
    ) -> None:
        """Take a message of QoS 1 or 2, or refuse it before anything is sent.

        Args:
            message: What to send; its topic and payload are checked already.
            timeout: Seconds to wait for room; None waits for ever, 0 not at all.
            wait_stored: Return when an outbox has it on disk. Otherwise it gets there before it is sent, and
                its receipt fails if it does not: for a caller that may not block, and awaits the receipt.
            durable: Keep it in an outbox, if there is one. How this process is doing says nothing of the next.

        Raises:
            ClosedError: The client was shut down.
            QueueFullError: No room came free in time.
            PublishRejectedError: No packet can carry it.
        """
        size = message.size
        _check_size(size)
        with self._lock:  # not the condition around it, which is slower to enter
            spool, bounds = self._spool if durable else None, self._firm_bounds
            if not bounds.fits(size):
                bounds.wait(size, timeout, self._refuses)
            if self._refusal is not None:
                raise fresh(self._refusal)
            if spool is None:
                self.firm.append(message)
            bounds.take(size)
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
        waited = False
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
                if objection is not None or self._memory.fits(size):
                    break
                # And look again: the connection may be another one.
                self._memory.wait(size, timeout, self._refuses_lossy)
                waited = True
            if objection is not None:
                if waited:
                    self._memory.leave_to_next()
            else:
                if not self.lossy and at_once and size <= LARGE_BYTES and not self._memory.waited_for:
                    # Under the lock it is the connection of these limits. It takes no place, so none comes free by
                    # it: not where others wait for one.
                    stream = self._idle_stream()
                if stream is None:
                    self.lossy.append(packet)
                    self._lossy_bytes += size
                    self._memory.take(size)
                    if size > LARGE_BYTES:
                        self.crowd.grew(self._lossy_bytes)
        if objection is not None:
            self._memory.call_back(1 if waited else 0)
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

    def _refuses(self) -> bool:
        return self._refusal is not None

    def _refuses_lossy(self) -> bool:
        return self._refusal is not None or self._limits is None

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
        with self._lock:
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
            bounds, told = self._firm_bounds, self._give(self._firm_bounds, 1, size)
        bounds.call_back(told)
        return True

    def _not_stored_late(self, spool: Spool, message: Outgoing, error: OutboxError) -> None:
        message.receipt._fail(self._not_stored(spool, message.size, error))

    def attach(self, spool: Spool, most: int, most_bytes: int) -> None:
        """Keep messages of QoS 1 and 2 in a durable outbox from now on, and send what lies there."""
        bounds = Bounds(self._lock, most, most_bytes, ("outbox_max_messages", "outbox_max_bytes"))
        bounds.held, bounds.held_bytes = spool.on_disk_only, spool.bytes_found
        with self._lock:
            self._spool = spool
            self._firm_bounds = bounds

    def open(self) -> None:
        """Admit messages from now on."""
        with self._lock:
            self._refusal = None

    def refuse(self, reason: Exception) -> None:
        """Admit nothing more."""
        with self._lock:
            self._refusal = reason
            every = {self._memory, self._firm_bounds}
            for bounds in every:
                bounds.notify_all()
        for bounds in every:
            bounds.call_back()

    def wait_flushed(self, timeout: float) -> bool:
        """Wait until the broker has every message of QoS 1 and 2, and the network every other."""
        with self._lock:
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
        with self._lock:
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
        with self._lock:
            self._limits = None
            lost = len(self.lossy)
            self._give(self._memory, lost, self._lossy_bytes)
            self._lossy_bytes = 0
            self.crowd.shrank(0)
            self.lossy.clear()
            self._memory.notify_all()
        self._memory.call_back()
        self.crowd.tell()
        return lost

    def too_old(self, message: Outgoing) -> bool:
        """Whether *message* has waited in the outbox for too long."""
        return self._spool is not None and self._spool.too_old(message)

    def load_more(self) -> None:
        """Have more read of what is on disk, if memory runs low of it."""
        if self._spool is not None and self._spool.wants_more(len(self.firm)):
            with self._lock:
                self._spool.load(partial(self._loaded, self._spool))

    def _loaded(self, spool: Spool, messages: list[Outgoing]) -> None:
        """More of what is on disk. Timer thread."""
        with self._lock:
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
        self._free(self._firm_bounds, 1, message.size)

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
        self._free(self._memory, len(packets), size)
        self.crowd.tell()
        return packets, size

    def _free(self, bounds: Bounds, count: int, size: int) -> None:
        with self._lock:
            told = self._give(bounds, count, size)
        bounds.call_back(told)

    def _give(self, bounds: Bounds, count: int, size: int) -> int:
        """See `Bounds.give`. Holds the lock."""
        told = bounds.give(count, size)
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
        with self._lock:
            held = (*in_flight, *self.firm)
            lossy = len(self.lossy)
            spool = self._spool
            self._retired, self._spool = spool or self._retired, None
            self.firm.clear()
            self.lossy.clear()
            self._firm_bounds.clear()
            self._firm_bounds = self._memory
            self._memory.clear()
            self._lossy_bytes = 0
            self.crowd.shrank(0)
            self._left.notify_all()
        self.crowd.tell()
        # What was taken back is done already.
        lost = [message for message in held if message.stored is None and not message.receipt.done()]
        if spool is not None:
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
        if self._retired is not None:
            self._retired.close()
            self._retired = None  # only now: where Ctrl-C comes in between, the next call closes it


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
