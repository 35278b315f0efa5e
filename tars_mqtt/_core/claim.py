"""One subscription's part in deduplication: it sees an envelope id once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Literal

from tars_mqtt._core.lane import Delivery
from tars_mqtt._core.stats import Counters
from tars_mqtt.context import log_fields
from tars_mqtt.dedup import MessageDeduplicator
from tars_mqtt.errors import DecodeError

logger = logging.getLogger("tars_mqtt.dispatch")


class Claims:
    """Claims the id of a delivery when its work begins, and keeps or releases it at the end. Any thread.

    Args:
        deduplicator: None where there is no deduplication: every claim is granted, and forgotten.
        identity: The subscription's, for each has its own claims.
        correlation: The setting, on which it hangs what a message is known by.
    """

    def __init__(
        self,
        deduplicator: MessageDeduplicator | None,
        identity: str,
        correlation: Literal["field", "id"],
        counters: Counters,
        client_id: str,
    ) -> None:
        self.wanted = deduplicator is not None
        """False without deduplication: callers may skip `claim`, which is always granted then."""
        self._deduplicator = deduplicator
        self._identity = identity
        self._correlation = correlation
        self._counters = counters
        self._client_id = client_id

    def begin(self, deliveries: Iterable[Delivery]) -> None:
        """Work on *deliveries* begins in the life of now; a claim in a later one would be no good. Holds a lock."""
        if self._deduplicator is not None:
            for delivery in deliveries:
                delivery.life = self._deduplicator.lives

    def claim(self, delivery: Delivery) -> bool:
        """Whether the work on *delivery* may begin; a duplicate is counted, and is over."""
        if self._deduplicator is None:
            return True
        message = delivery.message
        try:
            claim = self._identity, message.envelope.dedup_key(self._correlation)
        except DecodeError:
            return True  # without an envelope there is no id to know it by
        if self._deduplicator.claim(claim, delivery.life):
            delivery.claim = claim
            return True
        if logger.isEnabledFor(logging.DEBUG):
            fields = log_fields(message, self._client_id)
            logger.debug("filtered a duplicate on %r", message.topic, extra=fields)
        self._counters.add("duplicates")
        return False

    def keep(self, delivery: Delivery) -> None:
        """The work is done: a repetition is a duplicate."""
        if delivery.claim is not None and self._deduplicator is not None:
            self._deduplicator.keep(delivery.claim)

    def release(self, delivery: Delivery) -> None:
        """The work failed: a repetition is to be handled."""
        if delivery.claim is not None and self._deduplicator is not None:
            self._deduplicator.release(delivery.claim, delivery.life)
            delivery.claim = None  # it may be another's by the time this one ends
