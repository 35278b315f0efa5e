"""What waits for one subscription's handler, in the order in which it must be handled."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

import attrs

from tars_mqtt._core.ledger import Acknowledgement
from tars_mqtt.message import Message


@attrs.define(eq=False)
class Delivery:
    """One message on its way to one handler."""

    message: Message
    acknowledgement: Acknowledgement | None
    key: Hashable = None
    number: int = 0
    claim: Hashable = None
    """What deduplication knows it by, while it is in work."""
    life: int = 0
    """`MessageDeduplicator.lives` when its work began."""
    failures: int = 0
    error: str = ""
    """What the last failure said."""
    failed_first: float = 0.0
    """Unix time of the first failure."""
    cut_off: bool = False
    """Its handler was cancelled from outside."""
    given_up: bool = False
    """Its time was up while its handler went on: another `Delivery` has taken its place."""

    def finish(self) -> bool:
        """Count the delivery as over; True when an acknowledgement became due by it."""
        return self.acknowledgement is not None and self.acknowledgement.finish_one()


class Lane(Protocol):
    """The waiting deliveries of one subscription. Guarded by the lock of its dispatcher."""

    def push(self, deliveries: Iterable[Delivery]) -> None:
        """Append deliveries as they arrived."""

    def take(self, most: int) -> list[Delivery]:
        """Remove deliveries that may be handled now, one after the other."""

    def finish(self, batch: Sequence[Delivery]) -> int:
        """What `take` returned is over: what had to wait for it may go. Returns `takes`."""

    def drop_oldest(self) -> Delivery | None:
        """Give up the oldest QoS 0 delivery, if there is one."""

    def clear(self) -> list[Delivery]:
        """Remove and return everything."""

    def takes(self) -> int:
        """How many calls of `take` would return something now; only `push` and `finish` make it more."""

    def __len__(self) -> int: ...


class Fifo:
    """Strictly in order of arrival.

    QoS 0 stands in a line of its own, so that giving up its oldest is a single step however many
    messages of QoS 1 wait before it; numbers keep the order between the two lines.
    """

    def __init__(self) -> None:
        self._lossy: deque[Delivery] = deque()
        self._kept: deque[Delivery] = deque()
        self._number = 0

    def push(self, deliveries: Iterable[Delivery]) -> None:
        number = self._number
        for delivery in deliveries:
            number += 1
            delivery.number = number
            (self._lossy if delivery.acknowledgement is None else self._kept).append(delivery)
        self._number = number

    def take(self, most: int) -> list[Delivery]:
        lossy, kept = self._lossy, self._kept
        batch: list[Delivery] = []
        while lossy and kept and len(batch) < most:
            batch.append((lossy if lossy[0].number < kept[0].number else kept).popleft())
        line = lossy or kept
        while line and len(batch) < most:
            batch.append(line.popleft())
        return batch

    def finish(self, batch: Sequence[Delivery]) -> int:  # noqa: ARG002 - nothing waits for it
        return len(self._lossy) + len(self._kept)

    def drop_oldest(self) -> Delivery | None:
        return self._lossy.popleft() if self._lossy else None

    def clear(self) -> list[Delivery]:
        return self.take(len(self))

    def takes(self) -> int:
        return len(self._lossy) + len(self._kept)

    def __len__(self) -> int:
        return len(self._lossy) + len(self._kept)


class Keyed:
    """In order within a key, side by side across keys: a `Fifo` for each key that is in use."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, Fifo] = {}
        # Keys of which nothing is in work.
        self._runnable: OrderedDict[Hashable, None] = OrderedDict()
        # QoS 0 of all lines, the oldest first.
        self._lossy: OrderedDict[Delivery, None] = OrderedDict()
        self._size = 0

    def push(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            line = self._lines.get(delivery.key)
            if line is None:
                line = self._lines[delivery.key] = Fifo()
                self._runnable[delivery.key] = None
            line.push((delivery,))
            if delivery.acknowledgement is None:
                self._lossy[delivery] = None
            self._size += 1

    def take(self, most: int) -> list[Delivery]:
        while self._runnable:
            key, _ = self._runnable.popitem(last=False)
            batch = self._lines[key].take(most)
            if batch:
                for delivery in batch:
                    self._lossy.pop(delivery, None)
                self._size -= len(batch)
                return batch
            del self._lines[key]
        return []

    def finish(self, batch: Sequence[Delivery]) -> int:
        if batch:
            key = batch[0].key
            if len(self._lines[key]):
                self._runnable[key] = None
            else:
                del self._lines[key]
        return len(self._runnable)

    def drop_oldest(self) -> Delivery | None:
        if not self._lossy:
            return None
        delivery, _ = self._lossy.popitem(last=False)
        line = self._lines[delivery.key]
        line.drop_oldest()
        if not len(line) and delivery.key in self._runnable:
            del self._runnable[delivery.key], self._lines[delivery.key]
        self._size -= 1
        return delivery

    def clear(self) -> list[Delivery]:
        self._size = 0
        self._lossy.clear()
        return [delivery for line in self._lines.values() for delivery in line.clear()]

    def takes(self) -> int:
        return len(self._runnable)

    def __len__(self) -> int:
        return self._size
