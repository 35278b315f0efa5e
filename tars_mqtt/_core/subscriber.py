"""Asking the broker for the registered filters: SUBSCRIBE, UNSUBSCRIBE and their answers."""

from __future__ import annotations

import contextlib
import logging
import time
from concurrent.futures import Future, wait

import attrs

from tars_mqtt._core import wire
from tars_mqtt._core.event import Connack, Suback, Unsuback
from tars_mqtt._core.registry import FilterEntry, Registration, Registry
from tars_mqtt._core.stream import ConnectionLostError
from tars_mqtt._core.transport import Transport
from tars_mqtt.errors import SubscribeError
from tars_mqtt.topics import is_shared

logger = logging.getLogger("tars_mqtt.session")


@attrs.define(eq=False)
class Departure:
    """One UNSUBSCRIBE from all groups."""

    waiters: dict[str, Future[None]]
    """The shared filters; each is done when the broker has answered for it."""
    owing: bool = True
    """Whether acknowledgements were owed for messages of the groups when it was written."""

    def wait(self, timeout: float) -> bool:
        """Wait for all answers; False when the time was up first."""
        return not wait(self.waiters.values(), timeout).not_done


_REPLAY_TIME = 2.0
"""Seconds for which retained messages may take to arrive behind the answer to a SUBSCRIBE."""


class Subscriber:
    """Keeps the broker's idea of our subscriptions in step with the registry.

    Owned by the network thread. A waiter is told the broker's answer, or at once that there is
    nobody to ask: what is registered is asked for on the next connection.
    """

    def __init__(self, registry: Registry, transport: Transport, client_id: str) -> None:
        self._registry = registry
        self._transport = transport
        self._client_id = client_id
        self._session = 0
        self._connected = False
        self._identifiers = False
        self._restoring: set[FilterEntry] = set()
        self._asked: dict[int, FilterEntry] = {}
        self._waiters: dict[FilterEntry, list[Future[None]]] = {}
        self._leaving: dict[int, tuple[str, Future[None] | None]] = {}
        """The filter of each UNSUBSCRIBE that is not answered, and who waits for that."""
        self._stale: set[str] = set()
        self._left_groups = False
        self._departing: dict[str, Future[None]] = {}
        """Of the shared filters that we have left, those for which the broker has not answered."""
        self._refused: list[tuple[str, str]] = []

    @property
    def restored(self) -> bool:
        """Whether the broker has answered for everything that was registered when the connection began."""
        return not self._restoring

    @property
    def waits(self) -> bool:
        """Whether somebody waits for the broker's answer."""
        return bool(self._waiters or self._leaving)

    def take_refusals(self) -> SubscribeError | None:
        """What the broker refused on this connection before it was `restored`."""
        refused, self._refused = self._refused, []
        return _subscribe_error(refused) if refused else None

    def shared_filters(self) -> list[str]:
        """Those of groups. Any thread."""
        return [entry.topic_filter for entry in self._registry.entries() if is_shared(entry.topic_filter)]

    @property
    def has_connection(self) -> bool:
        """Whether somebody is there to answer."""
        return self._connected

    def start(self) -> None:
        """A network thread begins: every filter is to be asked for."""
        if self._left_groups:
            self._left_groups = False
            self._departing.clear()
            for entry in self._registry.entries():
                if is_shared(entry.topic_filter):
                    entry.session = 0

    def connected(self, connack: Connack, resumed: bool) -> None:
        """Ask for what this session of the broker does not have yet."""
        self._connected = True
        self._identifiers = connack.subscription_identifiers
        self._refused.clear()
        if not resumed:
            self._session += 1
        stale, self._stale = self._stale, set()
        if connack.session_present:
            for topic_filter in stale:
                if not self._wants(topic_filter):
                    self._leaving[self._transport.unsubscribe(topic_filter)] = topic_filter, None
        departing, self._departing = self._departing, {}
        self._depart(departing)
        for entry in self._registry.entries():
            if entry.session != self._session and self._wants(entry.topic_filter):
                self._restoring.add(entry)
                self._ask(entry, entry.registrations)

    def _wants(self, topic_filter: str) -> bool:
        if self._left_groups and is_shared(topic_filter):
            return False
        return self._registry.router.get(topic_filter) is not None

    def leave_groups(self, departure: Departure) -> None:
        """Unsubscribe from the shared filters, though they stay registered: until the next start.

        Where the connection breaks, they are left on the next.
        """
        self._left_groups = True
        for topic_filter in departure.waiters:
            entry = self._registry.router.get(topic_filter)
            if entry is not None:
                self._restoring.discard(entry)
                self._tell(entry, None)
        self._depart(departure.waiters)

    def _depart(self, waiters: dict[str, Future[None]]) -> None:
        for topic_filter, waiter in waiters.items():
            self._departing[topic_filter] = waiter
            if self._connected:
                with contextlib.suppress(ConnectionLostError):
                    self._leaving[self._transport.unsubscribe(topic_filter)] = topic_filter, waiter

    def disconnected(self) -> None:
        """Nobody is there to answer."""
        self._connected = False
        self._restoring.clear()
        self._asked.clear()
        for entry in tuple(self._waiters):
            self._tell(entry, None)
        leaving, self._leaving = self._leaving, {}
        for topic_filter, waiter in leaving.values():
            if topic_filter in self._departing:
                continue  # it is left on the next connection
            self._stale.add(topic_filter)  # it may not have arrived
            if waiter is not None:
                _settle(waiter, None)

    def subscribe(self, entry: FilterEntry, registration: Registration, waiter: Future[None]) -> None:
        """Ask for a filter now, or on the next connection.

        A filter that the broker has already is asked for again when another registration joins
        it: the answer brings the retained messages, which go to the newcomer, and to those who came so shortly
        before that theirs may still be on their way. Nothing tells the two apart.
        """
        asked = registration in entry.replay
        if (
            not self._connected
            or not self._wants(entry.topic_filter)
            or (asked and entry.session == self._session)
        ):
            _settle(waiter, None)
            return
        self._waiters.setdefault(entry, []).append(waiter)
        if not asked:
            try:
                self._ask(entry, (registration,))
            except ConnectionLostError:
                self._tell(entry, None)

    def unsubscribe(self, entry: FilterEntry, waiter: Future[None]) -> None:
        """Tell the broker that nobody needs a filter any more."""
        self._restoring.discard(entry)
        self._tell(entry, None)
        if self._registry.router.get(entry.topic_filter) is not None:
            _settle(waiter, None)  # somebody needs it again
        elif not self._connected:
            self.forget(entry)
            _settle(waiter, None)
        else:
            try:
                self._leaving[self._transport.unsubscribe(entry.topic_filter)] = entry.topic_filter, waiter
            except ConnectionLostError:
                self.forget(entry)
                _settle(waiter, None)

    def forget(self, entry: FilterEntry) -> None:
        """The broker may still have a filter that nobody needs: tell it when there is a connection."""
        if entry.asked:
            self._stale.add(entry.topic_filter)

    def on_suback(self, answer: Suback) -> None:
        """Take the broker's answer; one to a direct use of paho's client is none of ours."""
        entry = self._asked.pop(answer.packet_id, None)
        if entry is None:
            return
        code = answer.codes[0] if answer.codes else 0x80
        if code < 0x80:
            entry.session = self._session
            self._tell(entry, None)
        else:
            reason = wire.reason_name(code)
            logger.error(
                "the broker refused the subscription %r: %s",
                entry.topic_filter,
                reason,
                extra={"client_id": self._client_id, "topic": entry.topic_filter},
            )
            self._tell(entry, _subscribe_error([(entry.topic_filter, reason)]))
            if entry in self._restoring:
                self._refused.append((entry.topic_filter, reason))
        self._restoring.discard(entry)

    def on_unsuback(self, answer: Unsuback) -> None:
        """Take the broker's answer."""
        topic_filter, waiter = self._leaving.pop(answer.packet_id, ("", None))
        if waiter is not None:
            if self._departing.get(topic_filter) is waiter:
                del self._departing[topic_filter]
            _settle(waiter, None)

    def _ask(self, entry: FilterEntry, newcomers: tuple[Registration, ...]) -> None:
        now = time.monotonic()
        if now - entry.asked_at < _REPLAY_TIME:
            earlier = [one for one in entry.replay if one in entry.registrations]
            newcomers = tuple(dict.fromkeys((*earlier, *newcomers)))
        entry.session = 0
        entry.asked = True
        entry.asked_at = now
        entry.replay = newcomers
        packet_id = self._transport.subscribe(
            entry.topic_filter, entry.qos, entry.identifier if self._identifiers else None
        )
        self._asked[packet_id] = entry

    def _tell(self, entry: FilterEntry, error: SubscribeError | None) -> None:
        for waiter in self._waiters.pop(entry, ()):
            _settle(waiter, error)


def _settle(waiter: Future[None], error: Exception | None) -> None:
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)


def _subscribe_error(refused: list[tuple[str, str]]) -> SubscribeError:
    listed = "; ".join(f"{topic_filter!r}: {reason}" for topic_filter, reason in refused)
    return SubscribeError(f"the broker refused {listed}; check the rules of the broker", refused)
