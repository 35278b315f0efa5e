"""Numbered events over a bad network or broker, and the account of them at the end."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.support.colour import ClientMaker

PATIENCE = 20.0

_DATA = re.compile(rb'"data":(-?\d+)')


def numbers(payloads: Iterable[bytes]) -> list[int]:
    """The data of envelopes whose data is a number."""
    found = []
    for payload in payloads:
        match = _DATA.search(payload)
        assert match, f"no numbered event: {payload!r}"
        found.append(int(match[1]))
    return found


class Traffic:
    """A publisher and a listener at the same end of a bad network; what is published must arrive.

    Args:
        make_client: The fixture of that name, or anything that makes clients.
        url: Where both connect.
        settings: For both.
    """

    def __init__(self, make_client: ClientMaker, url: str, **settings: Any) -> None:
        self.received: list[bytes] = []
        self.receipts: list[Any] = []
        self.listener = make_client(url, client_id="listener", **settings)
        self.listener.subscribe("a", self.received.append, 1)
        self.listener.connect()
        self.publisher = make_client(url, client_id="publisher", **settings)
        self.publisher.connect()

    def publish(self, count: int, qos: int = 1) -> int:
        """Submit so many more events, without waiting for anything, and return the number of the first."""
        first = len(self.receipts)
        for number in range(first, first + count):
            self.receipts.append(self.publisher.submit_event("a", "n", number, qos=qos))
        return first

    def disturbed_by(self, fault: Callable[[], object]) -> None:
        """Do *fault*, and return when both clients have lost their connection and have another one."""
        clients = self.listener, self.publisher
        before = [client.stats().connections for client in clients]
        fault()
        for client, connections in zip(clients, before, strict=True):
            eventually(partial(_connected_again, client, connections), PATIENCE)

    def assert_settled(self, since: int = 0) -> None:
        """The broker has acknowledged everything from number *since* on."""
        for receipt in self.receipts[since:]:
            receipt.result(PATIENCE)

    def assert_nothing_is_lost(self, since: int = 0) -> None:
        """The broker has acknowledged, and the listener has seen, everything from number *since* on."""
        self.assert_settled(since)
        expected = set(range(since, len(self.receipts)))

        def lost() -> set[int]:
            return expected - {int(match[1]) for match in map(_DATA.search, self.received) if match}

        eventually(lambda: not lost(), PATIENCE, lambda: f"lost: {sorted(lost())}")

    def assert_order(self) -> None:
        """What came first came in the order in which it was published; repetitions may follow."""
        first_seen = list(dict.fromkeys(numbers(self.received)))
        assert first_seen == sorted(first_seen)


def _connected_again(client: Any, connections: int) -> bool:
    return bool(client.stats().connections > connections and client.connected)
