"""Asking the broker for the registered filters: SUBSCRIBE, UNSUBSCRIBE and their answers."""

from __future__ import annotations

import contextlib
import logging
import time
from concurrent.futures import Future, wait

import attrs

from tars_mqtt._core import wire
from tars_mqtt._core.event import Connack, Suback, Unsuback
from tars_mqtt._core.ledger import Debt
from tars_mqtt._core.registry import FilterEntry, Registration, Registry
from tars_mqtt._core.stream import ConnectionLostError
from tars_mqtt._core.transport import Transport
from tars_mqtt.errors import SubscribeError
from tars_mqtt.topics import is_shared

logger = logging.getLogger("tars_mqtt.session")


@attrs.define(eq=False)
class Departure:
    """One UNSUBSCRIBE from all shared subscriptions."""

    answers: dict[str, Future[bool]]
    """By filter: whether the broker has answered, once it has, or is gone."""
    owed: Debt = Debt(0, 0)  # noqa: RUF009 - a tuple
    """What was still to be said of shared messages when it was written."""
    arrived: int = 0
    """How many of them had come by then."""

    def wait(self, timeout: float) -> bool:
        """Wait for all answers; False when the time was up first."""
        return not wait(self.answers.values(), timeout).not_done

    @property
    def answered(self) -> bool:
        """Whether the broker has answered for all of them. Not before they were waited for."""
        return all(answer.result(0) for answer in self.answers.values())


_REPLAY_TIME = 2.0
"""Seconds for which retained messages may take to arrive behind the answer to a SUBSCRIBE."""


class Subscriber:
    """Keeps the broker's idea of our subscriptions in step with the registry.

    Owned by the network thread. A waiter is told the broker's answer, or at once that there is
    nobody to ask: what is registered is asked for on the next connection, and what is not, left.
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
        self._unneeded: set[str] = set()
        """Filters that the broker may still have though nobody needs them: until it has answered."""
        self._leaving: dict[int, tuple[str, Future[bool] | None]] = {}
        """The filter of each UNSUBSCRIBE that is not answered on this connection, and who waits for that."""
        self._left_shared = False
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
        """Those of shared subscriptions. Any thread."""
        return [entry.topic_filter for entry in self._registry.entries() if is_shared(entry.topic_filter)]

    @property
    def has_connection(self) -> bool:
        """Whether somebody is there to answer."""
        return self._connected

    def start(self) -> None:
        """A network thread begins: every filter is to be asked for."""
        if self._left_shared:
            self._left_shared = False
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
        if not connack.session_present:
            self._unneeded.clear()
        for topic_filter in tuple(self._unneeded):
            if not self._wants(topic_filter):
                self._leave(topic_filter, None)
        for entry in self._registry.entries():
            if entry.session != self._session and self._wants(entry.topic_filter):
                self._restoring.add(entry)
                self._ask(entry, entry.registrations)

    def _wants(self, topic_filter: str) -> bool:
        if self._left_shared and is_shared(topic_filter):
            return False
        return self._registry.router.get(topic_filter) is not None

    def leave_shared(self, departure: Departure) -> None:
        """Unsubscribe from the shared filters, though they stay registered: until the next start.

        Where the connection breaks, they are left on the next.
        """
        self._left_shared = True
        for topic_filter, waiter in departure.answers.items():
            entry = self._registry.router.get(topic_filter)
            if entry is not None:
                self._restoring.discard(entry)
                self._tell(entry, None)
                self.forget(entry)
            self._leave(topic_filter, waiter)

    def _leave(self, topic_filter: str, waiter: Future[bool] | None) -> None:
        """Say UNSUBSCRIBE, if there is a connection to say it on."""
        if self._connected:
            with contextlib.suppress(ConnectionLostError):
                self._leaving[self._transport.unsubscribe(topic_filter)] = topic_filter, waiter
                return
        if waiter is not None:
            waiter.set_result(False)

    def disconnected(self) -> None:
        """Nobody is there to answer."""
        self._connected = False
        self._restoring.clear()
        self._asked.clear()
        for entry in tuple(self._waiters):
            self._tell(entry, None)
        leaving, self._leaving = self._leaving, {}
        for topic_filter, waiter in leaving.values():
            self._unneeded.add(topic_filter)  # also where an earlier UNSUBSCRIBE of it was answered
            if waiter is not None:
                waiter.set_result(False)

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
        under_way = asked and entry in self._asked.values()
        if not under_way:  # where the answer was a refusal, it may be another now
            try:
                self._ask(entry, (registration,))
            except ConnectionLostError:
                self._tell(entry, None)

    def unsubscribe(self, entry: FilterEntry, waiter: Future[bool]) -> None:
        """Tell the broker that nobody needs a filter any more."""
        self._restoring.discard(entry)
        self._tell(entry, None)
        if self._registry.router.get(entry.topic_filter) is not None:
            waiter.set_result(False)  # somebody needs it again
            return
        self.forget(entry)
        self._leave(entry.topic_filter, waiter)

    def forget(self, entry: FilterEntry) -> None:
        """The broker may still have a filter that nobody needs: tell it when there is a connection."""
        if entry.asked:
            self._unneeded.add(entry.topic_filter)

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
        self._unneeded.discard(topic_filter)
        if waiter is not None:
            waiter.set_result(True)

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
