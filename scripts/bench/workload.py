"""What is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

WINDOW = 64
"""QoS 1 messages that a publisher has open at once."""

Far = Literal["nobody", "subscriber", "publisher"]


@attrs.frozen
class Metric:
    """One number of a measurement."""

    name: str
    unit: str
    more_is_better: bool = False


RATE = Metric("rate", "messages/s", more_is_better=True)
CPU = Metric("cpu", "CPU µs/message")
P50 = Metric("p50", "p50 µs")
P99 = Metric("p99", "p99 µs")
BYTES = Metric("bytes", "bytes/message")
MILLISECONDS = Metric("ms", "ms")


@attrs.frozen(kw_only=True)
class Workload:
    """One task for a client, done in a process of its own.

    Args:
        name: For the command line.
        title: For people.
        run: The method of the client that does it.
        messages: How many; enough for a fraction of a second.
        far: Who else is connected to the broker.
        filters: How many filters are registered, each with a handler; topics match each of *topics* in turn.
        backlog: The client is stopped until all messages are sent: the broker is not what it waits for.
        padding: Characters that each payload is made longer by.
        settings: For this package only, which alone has them; others sit these workloads out.
    """

    name: str
    title: str
    run: str
    messages: int
    metrics: tuple[Metric, ...] = (RATE, CPU)
    far: Far = "nobody"
    qos: int = 0
    filters: int = 0
    topics: int = 1
    backlog: bool = False
    padding: int = 0
    threads: bool = False
    settings: Mapping[str, Any] = attrs.field(factory=dict)

    def quick(self) -> Workload:
        """The same with little of everything."""
        messages = min(self.messages, max(2, 200_000 // (1_000 + self.padding)))
        return attrs.evolve(
            self, messages=messages, filters=min(self.filters, 10), topics=min(self.topics, 10)
        )

    def scaled(self, factor: float) -> Workload:
        """The same with more messages, or fewer."""
        return attrs.evolve(self, messages=int(self.messages * factor))


def _publish(name: str, title: str, messages: int, **options: Any) -> Workload:
    return Workload(name=name, title=title, run="publish", messages=messages, **options)


def _receive(name: str, title: str, messages: int, **options: Any) -> Workload:
    options = {"filters": 1} | options
    return Workload(name=name, title=title, run="receive", messages=messages, far="publisher", **options)


_DEDUPLICATION = {"dedupe_ttl": 600.0, "dedupe_max_entries": 100_000}
_OUTBOX = {"outbox": "{directory}/outbox.db"}

WORKLOADS = (
    _publish("publish-0", "Publish QoS 0", 20_000),
    _publish("deliver-0", "Publish QoS 0, until a subscriber has it", 20_000, far="subscriber"),
    Workload(name="publish-1", title=f"Publish QoS 1, {WINDOW} open", run="window", messages=10_000, qos=1),
    Workload(name="sequential-1", title="Publish QoS 1, one by one", run="sequential", messages=3_000, qos=1),
    _receive("receive-0", "Receive QoS 0", 20_000),
    _receive("receive-1", "Receive QoS 1", 10_000, qos=1),
    _receive("backlog-1", "Receive QoS 1, a backlog", 10_000, qos=1, backlog=True),
    Workload(
        name="round-trip",
        title="Round trip, 1 in flight",
        run="round_trip",
        messages=3_000,
        metrics=(P50, P99, CPU),
        filters=1,
    ),
    _receive("filters-1000", "Receive, 1,000 filters in turn", 20_000, filters=1_000, topics=1_000),
    _receive("filters-10000", "Receive, 1 of 10,000 filters", 20_000, filters=10_000),
    Workload(
        name="threads-0", title="Publish QoS 0, 16 threads", run="threads", messages=20_000, threads=True
    ),
    Workload(
        name="threads-1",
        title="Publish QoS 1, 16 threads",
        run="threads",
        messages=8_000,
        qos=1,
        threads=True,
    ),
    _publish("publish-1kB", "Publish 1 kB", 10_000, padding=1_000 - 230),
    _publish("publish-64kB", "Publish 64 kB", 800, padding=64_000 - 230),
    _publish("publish-1MB", "Publish 1 MB", 60, padding=1_000_000 - 230),
    _receive("receive-1kB", "Receive 1 kB", 10_000, padding=1_000 - 230),
    _receive("receive-64kB", "Receive 64 kB", 800, padding=64_000 - 230),
    _receive("receive-1MB", "Receive 1 MB", 60, padding=1_000_000 - 230),
    Workload(
        name="memory",
        title="Memory of a queued message",
        run="queue",
        messages=5_000,
        metrics=(BYTES,),
        qos=1,
    ),
    Workload(
        name="start-up",
        title="Start of the process until connected",
        run="connect",
        messages=0,
        metrics=(MILLISECONDS,),
        filters=1,
    ),
    Workload(name="import", title="Import", run="import", messages=0, metrics=(MILLISECONDS,)),
    _receive("dedup-1", "Receive QoS 1, deduplicated", 10_000, qos=1, settings=_DEDUPLICATION),
    Workload(
        name="outbox-1",
        title=f"Publish QoS 1, {WINDOW} open, outbox",
        run="window",
        messages=10_000,
        qos=1,
        settings=_OUTBOX,
    ),
)
