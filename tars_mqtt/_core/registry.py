"""The registered subscriptions, and the filters that the broker is asked for on their behalf."""

from __future__ import annotations

import math
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

import attrs

from tars_mqtt._core import wire
from tars_mqtt._core.dispatch import Consumer
from tars_mqtt._core.router import Router
from tars_mqtt.message import Message

_LAST_IDENTIFIER = wire.MAX_VARINT

_MOST_GONE = 1_000
"""Filters that are remembered after their last registration: one for each question that was asked, for instance."""


@attrs.define(eq=False)
class Registration:
    """One call of ``subscribe``: a filter and who gets its messages."""

    topic_filter: str
    qos: int
    consumer: Consumer
    key_of: Callable[[Message], Hashable] | None = None
    """Gives a message's key of ``order_by``; None where there is none."""


@attrs.define(eq=False)
class FilterEntry:
    """One filter as the broker knows it: several registrations may share it.

    The last five are owned by the network thread.
    """

    topic_filter: str
    identifier: int
    """Subscription Identifier (MQTT 5), the same in each process that subscribes with this filter:
    the broker's session may outlive us."""
    registrations: tuple[Registration, ...]
    qos: int
    session: int = 0
    """The broker's session in which it was last acknowledged."""
    asked: bool = False
    """Whether the broker was ever asked for it."""
    asked_at: float = -math.inf
    """When it was asked for last, on the monotonic clock."""
    replay: tuple[Registration, ...] = ()
    """Who gets the retained messages that the last SUBSCRIBE brought."""
    identified: bool = False
    """Whether a message with its identifier came in this session."""


class Registry:
    """All registrations of a client. Any thread.

    `router` is replaced whole on each change and read without a lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[str, dict[str, int]] = {}
        """How often each filter had each handler."""
        self._gone: OrderedDict[str, None] = OrderedDict()
        """Of these filters, those that nobody needs any more, but may again; the latest last."""
        self._identifiers: set[int] = set()
        self.router: Router[FilterEntry] = Router()

    def next_identity(self, topic_filter: str, handler: str) -> str:
        """A name for a registration to come, that no other has or had lately.

        It is the same in each run of a service, whatever else subscribes, or did. Only those of one filter whose
        handlers have the same name are told apart by their order.
        """
        with self._lock:
            uses = self._uses.setdefault(topic_filter, {})
            uses[handler] = number = uses.get(handler, 0) + 1
            return f"{topic_filter}#{handler}#{number}"

    def add(self, registration: Registration) -> FilterEntry:
        """Enter a registration; returns the filter that the broker must be asked for."""
        with self._lock:
            topic = registration.topic_filter
            entry = self.router.get(topic)
            self._gone.pop(topic, None)
            if entry is None:
                entry = FilterEntry(topic, self._identifier(topic), (registration,), registration.qos)
                self.router = self.router.add(topic, entry)
            else:
                entry.registrations += (registration,)
                entry.qos = max(entry.qos, registration.qos)
                # Same filters, other routes: whoever keeps routes must notice.
                self.router = self.router.add(topic, entry)
            return entry

    def remove(self, registration: Registration) -> FilterEntry | None:
        """Take a registration out; returns its filter if nobody needs that any more."""
        with self._lock:
            entry = self.router.get(registration.topic_filter)
            if entry is None or registration not in entry.registrations:
                return None
            entry.registrations = tuple(other for other in entry.registrations if other is not registration)
            if entry.registrations:
                self.router = self.router.add(entry.topic_filter, entry)
                return None
            self.router = self.router.remove(entry.topic_filter)
            self._identifiers.discard(entry.identifier)
            self._gone[entry.topic_filter] = None
            if len(self._gone) > _MOST_GONE:
                self._uses.pop(self._gone.popitem(last=False)[0], None)
            return entry

    def registrations(self) -> list[Registration]:
        """All registrations."""
        return [registration for entry in self.router for registration in entry.registrations]

    def entries(self) -> list[FilterEntry]:
        """All filters, in the order of their first registration."""
        return list(self.router)

    def _identifier(self, topic_filter: str) -> int:
        identifier = zlib.crc32(topic_filter.encode()) % _LAST_IDENTIFIER + 1
        while identifier in self._identifiers:
            identifier = identifier % _LAST_IDENTIFIER + 1
        self._identifiers.add(identifier)
        return identifier
