"""What a client counts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

import attrs


@attrs.frozen(kw_only=True)
class Stats:
    """A snapshot of a client's counters. Counts are totals since the client was made.

    Attributes:
        messages_in: PUBLISH packets received.
        bytes_in: Bytes received from the broker, all packets.
        messages_out: PUBLISH packets written, repetitions included.
        bytes_out: Bytes written to the broker, all packets.
        acknowledged: Outgoing QoS 1/2 messages that the broker acknowledged.
        retried: Outgoing QoS 1/2 messages sent again after a reconnect.
        rejected: Outgoing messages that the broker refused or that can never be sent.
        handled: Deliveries whose handler returned.
        duplicates: Deliveries that deduplication filtered.
        decode_failures: Deliveries whose payload was not what the handler asks for.
        handler_failures: Deliveries whose handler raised.
        handler_retries: Further attempts after a failure.
        handler_timeouts: Handlers that did not return in time.
        dead_letters: Deliveries that ended as dead letters.
        dropped: Messages given up, by reason: ``max_pending``, ``max_payload_bytes``, ``no_handler``,
            ``unsubscribed``, ``connection_lost``, ``dead_letter``, ``shutdown``.
        connections: Connections established.
        reconnects: Connections established after the first.
        queued: Outgoing messages held now, unacknowledged ones included.
        queued_bytes: The bytes of their topics, payloads and properties; of QoS 0, those of whole packets.
        inflight: Outgoing QoS 1/2 messages sent and not yet acknowledged.
        pending: Incoming messages that wait for a handler or are in work; one for each handler that takes it.
        last_error: The last failure of the connection, in words.
        ping_round_trip: Seconds between the last ping and its answer.
    """

    messages_in: int = 0
    bytes_in: int = 0
    messages_out: int = 0
    bytes_out: int = 0
    acknowledged: int = 0
    retried: int = 0
    rejected: int = 0
    handled: int = 0
    duplicates: int = 0
    decode_failures: int = 0
    handler_failures: int = 0
    handler_retries: int = 0
    handler_timeouts: int = 0
    dead_letters: int = 0
    dropped: Mapping[str, int] = attrs.field(factory=dict)
    connections: int = 0
    reconnects: int = 0
    queued: int = 0
    queued_bytes: int = 0
    inflight: int = 0
    pending: int = 0
    last_error: str | None = None
    ping_round_trip: float | None = None


class Counters:
    """Totals that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Add to one total of `Stats`, by the name of its field."""
        with self._lock:
            self._totals[name] += count

    def drop(self, reason: str, count: int = 1) -> None:
        """Count messages that were given up."""
        with self._lock:
            self._dropped[reason] += count

    def totals(self) -> dict[str, int]:
        """A copy of the totals."""
        with self._lock:
            return dict(self._totals)

    def dropped(self) -> dict[str, int]:
        """A copy of the totals of what was given up, by reason."""
        with self._lock:
            return dict(self._dropped)
