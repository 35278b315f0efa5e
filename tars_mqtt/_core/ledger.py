"""Acknowledging incoming QoS 1 and 2 messages: after the work, in the order of arrival."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from tars_mqtt._core import wire
from tars_mqtt.message import Message

if TYPE_CHECKING:
    from tars_mqtt._core.registry import Registration


class Acknowledgement:
    """What stands between one incoming message and its PUBACK or PUBREC.

    Each delivery of the message calls `finish_one` once, on any thread.
    """

    __slots__ = ("_lock", "_open", "finished", "message", "packet_id", "takers")

    def __init__(self, message: Message, packet_id: int, deliveries: int) -> None:
        self.message = message
        self.packet_id = packet_id
        self.takers: tuple[Registration, ...] = ()
        """The subscriptions that it came for."""
        self.finished = deliveries == 0
        self._open = deliveries
        # One delivery needs no lock, and most messages have one.
        self._lock = threading.Lock() if deliveries > 1 else None

    def share(self, deliveries: int) -> None:
        """Wait for that many deliveries, not one. Before any of them is on its way."""
        self._open = deliveries
        self._lock = threading.Lock() if deliveries > 1 else None

    def finish_one(self) -> bool:
        """One delivery is over; True when it was the last."""
        if self._lock is not None:
            with self._lock:
                self._open -= 1
                if self._open:
                    return False
        self.finished = True
        return True


class Debt(NamedTuple):
    """How many messages of one kind the broker still has with us."""

    unacknowledged: int
    unreleased: int
    """Of QoS 2: acknowledged, and it is for the broker to say the next word."""


class Ledger:
    """The incoming messages of the session that the broker still counts as ours to acknowledge.

    Owned by the network thread. Acknowledgements leave in the order of arrival [MQTT-4.6.0-2],
    each on the connection its message came on: a message that is still in work when the connection
    breaks is acknowledged when the broker delivers it again, without being handled twice.
    """

    def __init__(self) -> None:
        self._order: deque[Acknowledgement] = deque()
        self._in_work: dict[int, Acknowledgement] = {}
        # QoS 2 packet ids between our PUBREC and the broker's PUBREL [MQTT-4.3.3-10], and whom the message came for.
        self._received: dict[int, tuple[Registration, ...]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def unacknowledged(self) -> list[tuple[Registration, ...]]:
        """Whom each message came for that is not acknowledged on this connection."""
        return [acknowledgement.takers for acknowledgement in self._order]

    def unreleased(self) -> list[tuple[Registration, ...]]:
        """Whom each message of QoS 2 came for that the broker has not released."""
        return list(self._received.values())

    def new_connection(self, session_present: bool) -> None:
        """Nothing of an older connection is acknowledged on this one."""
        self._order.clear()
        if not session_present:
            self._in_work.clear()
            self._received.clear()

    def forget(self) -> None:
        """What is in work will never be done: it is handled when the broker delivers it again."""
        self._order.clear()
        self._in_work.clear()

    def note_repetition(self, packet_id: int, message: Message) -> bool:
        """Take note of a repetition; True when the message needs no handling again."""
        if message.qos == 2 and packet_id in self._received:
            # PUBREC was lost on the way: say it again, in its turn.
            self._order.append(Acknowledgement(message, packet_id, 0))
            return True
        earlier = self._in_work.get(packet_id)
        if earlier is None:
            return False
        same = (
            message.dup
            and earlier.message.qos == message.qos
            and earlier.message.topic == message.topic
            and earlier.message.payload == message.payload
        )
        if same:
            self._order.append(earlier)
        return same

    def accept(self, packet_id: int, message: Message, deliveries: int) -> Acknowledgement:
        """Enter a message that goes to that many handlers."""
        acknowledgement = Acknowledgement(message, packet_id, deliveries)
        self._in_work[packet_id] = acknowledgement
        self._order.append(acknowledgement)
        return acknowledgement

    def take_all_finished(self) -> list[bytes]:
        """Return the last acknowledgements of this connection: also those behind a message that is still in work.

        They leave in order; nothing may be taken for this connection after them.
        """
        finished: deque[Acknowledgement] = deque()
        unfinished: list[Acknowledgement] = []
        for each in self._order:
            (finished if each.finished else unfinished).append(each)
        self._order = finished
        packets = self.take_due()
        self._order.extend(unfinished)
        return packets

    def take_due(self) -> list[bytes]:
        """Return the acknowledgements that are due, as packets."""
        order = self._order
        packets: list[bytes] = []
        while order and order[0].finished:
            acknowledgement = order.popleft()
            packet_id = acknowledgement.packet_id
            if self._in_work.get(packet_id) is acknowledgement:
                del self._in_work[packet_id]
            if acknowledgement.message.qos == 2:
                self._received.setdefault(packet_id, acknowledgement.takers)
                packets.append(wire.encode_ack(wire.PUBREC, packet_id))
            else:
                packets.append(wire.encode_ack(wire.PUBACK, packet_id))
        return packets

    def on_pubrel(self, packet_id: int) -> bool:
        """PUBREL came: forget the id; False when it was not known."""
        return self._received.pop(packet_id, None) is not None
