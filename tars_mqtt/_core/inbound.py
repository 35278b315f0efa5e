"""The way in: from PUBLISH packets to deliveries, and their acknowledgements back."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Hashable

from tars_mqtt._core import wire
from tars_mqtt._core.dispatch import Consumer, Dispatcher
from tars_mqtt._core.lane import Delivery
from tars_mqtt._core.ledger import Acknowledgement, Debt, Ledger
from tars_mqtt._core.property import subscription_identifiers
from tars_mqtt._core.registry import FilterEntry, Registration, Registry
from tars_mqtt._core.stats import Counters
from tars_mqtt._core.throttle import Throttle
from tars_mqtt.message import Message
from tars_mqtt.printable import printable
from tars_mqtt.topics import is_shared

logger = logging.getLogger("tars_mqtt.dispatch")

_MOST_ROUTES = 4096

_EARLY_TIME = 2.0
"""Seconds after the last subscribe that messages of an unknown session wait for one to take them."""


class Inbound:
    """What happens to a message between the connection and the dispatcher.

    Owned by the network thread.
    """

    def __init__(
        self,
        registry: Registry,
        dispatcher: Dispatcher,
        counters: Counters,
        offer_elsewhere: Callable[[int, bytes], bool],
        client_id: str = "",
        max_payload_bytes: int = wire.MAX_REMAINING_LENGTH,
    ) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._surely_small = min(max_payload_bytes, wire.MAX_PROPERTIES_BYTES)
        self._too_large = Throttle()
        self._unhandled = Throttle()
        self._client_id = client_id
        self._registry = registry
        self._dispatcher = dispatcher
        self._counters = counters
        self._offer_elsewhere = offer_elsewhere
        self._ledger = Ledger()
        self._batches: defaultdict[Consumer, list[Delivery]] = defaultdict(list)
        self._router = registry.router
        # Topic and properties decide the route of a message that is not retained.
        self._routes: dict[tuple[str, bytes], tuple[Registration, ...]] = {}
        self._early: list[Delivery] = []  # in an unknown session, and nobody has subscribed yet
        self._early_until = math.inf
        self._v5 = True
        self._closing = False
        self._counts_shared = False
        self.shared_arrived = 0
        """Messages of QoS 1 and 2 that came for a shared subscription since `count_shared`."""
        self.messages = 0
        """Handed over so far: whoever sees one counted finds it pending, dropped or done."""
        self._entered = 0

    @property
    def unacknowledged(self) -> int:
        """Messages of QoS 1 and 2 that this connection still waits to see acknowledged."""
        return len(self._ledger)

    @property
    def owed_to_groups(self) -> Debt:
        """What is still to be said of messages that came for shared subscriptions."""
        ledger = self._ledger
        return Debt(sum(map(_shares, ledger.unacknowledged())), sum(map(_shares, ledger.unreleased())))

    # -- connections ------------------------------------------------------------------------

    def new_connection(self, v5: bool, resumed: bool, unknown_session: bool, now: float) -> None:
        """Start over; what is in work stays in work.

        Args:
            v5: Whether the connection speaks MQTT 5.
            resumed: The broker still has the session of our last connection.
            unknown_session: It has a session that we do not know, of an earlier process for instance, which
                may bring messages before anybody has subscribed.
            now: On the monotonic clock.
        """
        self._v5 = v5
        self._ledger.new_connection(resumed)
        # What came right before a malformed packet: entered, so not to be handled when it comes again.
        self.hand_over()
        if not resumed:
            self._early.clear()
        goes_on = resumed and self._early_until != math.inf
        self._early_until = now + _EARLY_TIME if unknown_session or self._early or goes_on else math.inf
        self._forget_routes()
        if not resumed:
            for entry in self._router:
                entry.identified = False

    def subscribed(self, now: float) -> None:
        """A subscription came, which early messages may wait for; others may follow."""
        self.route_early()
        self.hand_over()
        if self._early_until != math.inf:
            self._early_until = now + _EARLY_TIME

    def route_early(self) -> None:
        """Find takers for early messages, if there are any by now."""
        if self._router is self._registry.router:
            return
        self._forget_routes()
        early, self._early = self._early, []
        for delivery in early:
            takers = self._route(delivery.message.topic, b"", retain=False)
            if not takers:
                self._early.append(delivery)
                continue
            assert delivery.acknowledgement is not None
            delivery.acknowledgement.share(len(takers))
            self._deliver(delivery.message, delivery.acknowledgement, takers)

    def tick(self, now: float) -> float:
        """Give up early messages that nobody has come for in time; returns when to be called again."""
        if now < self._early_until:
            return self._early_until
        self._early_until = math.inf
        early, self._early = self._early, []
        for delivery in early:
            self._no_handler(delivery.message)
            delivery.finish()
        return now  # the acknowledgements come first: the broker may wait for them

    def open(self) -> None:
        """Take messages, again."""
        if self._closing:
            # After a shutdown: what had not been handled by then never will be.
            self._ledger.forget()
            self._early.clear()
            self._closing = False
        self._counts_shared = False

    def count_shared(self) -> None:
        """From now on keep `shared_arrived`."""
        self._counts_shared = True

    def close(self) -> None:
        """Take no more messages; what is in work may still be acknowledged."""
        self._closing = True

    # -- packets ----------------------------------------------------------------------------

    def on_publish(self, first: int, body: bytes) -> None:
        """Enter one PUBLISH.

        Raises:
            MalformedPacketError: It breaks the standard.
        """
        topic, payload, qos, retain, dup, packet_id, properties = wire.decode_publish(first, body, self._v5)
        self._entered += 1
        if self._closing:
            # Unacknowledged: the broker delivers it to the next connection of this session. But what is still in
            # work, and comes again on a new connection, is acknowledged on this one when it is done.
            if qos:
                self._ledger.note_repetition(packet_id, Message(topic, payload, qos, retain, dup))
            return
        if len(body) > self._surely_small and (
            len(payload) > self._max_payload_bytes or len(properties) > wire.MAX_PROPERTIES_BYTES
        ):
            self._give_up(Message(topic, b"", qos, retain, dup), packet_id)
            return
        message = Message(topic, payload, qos, retain, dup, properties)
        if qos and self._ledger.note_repetition(packet_id, message):
            return
        if self._router is not self._registry.router:
            self.route_early()
        if retain:
            takers = self._route(topic, properties, retain=True)
        else:
            found = self._routes.get((topic, properties))
            takers = self._find_route(topic, properties) if found is None else found
        if not takers:
            if not self._offer_elsewhere(first, body):
                self._without_taker(message, packet_id)
            return
        acknowledgement = self._ledger.accept(packet_id, message, len(takers)) if qos else None
        self._deliver(message, acknowledgement, takers)

    def on_passed_over(self, first: int, head: bytes) -> None:
        """Enter what is left of a PUBLISH that was too large to be held.

        Raises:
            MalformedPacketError: It breaks the standard.
        """
        topic, _, qos, retain, dup, packet_id, _ = wire.decode_publish(wire.PUBLISH | first, head, v5=False)
        self._entered += 1
        if not self._closing:
            self._give_up(Message(topic, b"", qos, retain, dup), packet_id)

    def on_pubrel(self, packet_id: int) -> bytes | None:
        """Answer PUBREL; None when the packet id is not ours."""
        if not self._ledger.on_pubrel(packet_id):
            return None
        return wire.encode_ack(wire.PUBCOMP, packet_id)

    def hand_over(self) -> None:
        """Give what was entered to the dispatcher, in one go."""
        if self._batches:
            batches, self._batches = self._batches, defaultdict(list)
            self._dispatcher.submit(batches)
        self.messages += self._entered
        self._entered = 0

    def last_acknowledgements(self) -> list[bytes]:
        """Those with which this connection is left."""
        return self._ledger.take_all_finished()

    def acknowledgements(self) -> list[bytes]:
        """The acknowledgements that are due on this connection."""
        return self._ledger.take_due()

    # -- inside -----------------------------------------------------------------------------

    def _deliver(
        self, message: Message, acknowledgement: Acknowledgement | None, takers: tuple[Registration, ...]
    ) -> None:
        if acknowledgement is not None:
            acknowledgement.takers = takers
            if self._counts_shared:
                self.shared_arrived += _shares(takers)
        for registration in takers:
            delivery = Delivery(message, acknowledgement)
            if registration.key_of is not None:
                delivery.key = self._key(registration.key_of, message)
            self._batches[registration.consumer].append(delivery)

    def _key(self, key_of: Callable[[Message], Hashable], message: Message) -> Hashable:
        try:
            key = key_of(message)
            hash(key)
        except Exception:
            logger.exception("order_by failed on a message of %r", message.topic, extra=self._extra(message))
            return None
        return key

    def _find_route(self, topic: str, properties: bytes) -> tuple[Registration, ...]:
        """The takers of a message that is not retained; remembered."""
        takers = self._route(topic, properties, retain=False)
        if len(self._routes) >= _MOST_ROUTES:
            self._routes.clear()
        if len(topic) + len(properties) < 1024:
            self._routes[topic, properties] = takers
        return takers

    def _forget_routes(self) -> None:
        self._router = self._registry.router
        self._routes.clear()

    def _route(self, topic: str, properties: bytes, retain: bool) -> tuple[Registration, ...]:
        entries = self._router.match(topic)
        identifiers = subscription_identifiers(properties) if properties else ()
        if identifiers and entries:
            entries = self._identified(entries, identifiers)
        takers: dict[Registration, None] = {}
        for entry in entries:
            takers.update(dict.fromkeys(entry.replay if retain else entry.registrations))
        return tuple(takers)

    def _identified(
        self, entries: tuple[FilterEntry, ...], identifiers: tuple[int, ...]
    ) -> tuple[FilterEntry, ...]:
        """Of several overlapping filters, those whose copy this is.

        An unknown identifier belongs to a filter of an earlier process in the same session. Its
        copy is for those who have not had one of their own yet: the broker keeps the order, so
        whatever was queued before they subscribed has arrived by then.
        """
        chosen = tuple(entry for entry in entries if entry.identifier in identifiers)
        if not chosen:
            return tuple(entry for entry in entries if not entry.identified)
        for entry in chosen:
            if not entry.identified:
                entry.identified = True
                self._routes.clear()
        return chosen

    def _without_taker(self, message: Message, packet_id: int) -> None:
        if not message.qos:
            self._no_handler(message)
        elif self._early_until != math.inf:
            self._early.append(Delivery(message, self._ledger.accept(packet_id, message, 1)))
        else:
            self._no_handler(message)
            self._ledger.accept(packet_id, message, 0)

    def _give_up(self, message: Message, packet_id: int) -> None:
        """Drop a message that is too large; acknowledged, since the broker would bring it again for ever."""
        if message.qos:
            if self._ledger.note_repetition(packet_id, message):
                return
            self._ledger.accept(packet_id, message, 0)
        self._counters.drop("max_payload_bytes")
        if count := self._too_large.admit():
            logger.warning(
                "dropped %d messages larger than max_payload_bytes, the last of them on %r",
                count,
                message.topic,
                extra=self._extra(message),
            )

    def _no_handler(self, message: Message) -> None:
        self._counters.drop("no_handler")
        if not message.qos:
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("nobody handles %r", message.topic, extra=self._extra(message))
        elif count := self._unhandled.admit():
            logger.warning(
                "acknowledged %d messages of QoS 1 or 2 that nobody handles, the last of them on %r: "
                "subscribe before connect(), or unsubscribe from what an earlier process had subscribed to",
                count,
                message.topic,
                extra=self._extra(message),
            )

    def _extra(self, message: Message) -> dict[str, object]:
        return {"client_id": self._client_id, "topic": printable(message.topic), "qos": message.qos}


def _shares(takers: tuple[Registration, ...]) -> bool:
    """Whether a message with these takers is one of a group's."""
    return any(is_shared(taker.topic_filter) for taker in takers)
