"""What is kept of a flood of events during an outage, and what that takes."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from reliability import contender
from reliability.outcome import Outcome
from tests.support import Broker, eventually

_TOPIC = "outage"
_DATA = {"number": 12345, "note": "x" * 60}
_PATIENCE = 400.0
_BATCH = 1_000
_KEEPS_ALL = ("max_queued_messages 0",)


def in_memory(client_name: str, quick: bool) -> Outcome:
    count = 2_000 if quick else 200_000
    if client_name in contender.OURS:
        overhead = _overhead(client_name, count)
        bound, refused, arrived = _bound(client_name, count)
        return Outcome(
            f"{bound:,} kept (the bound) and {refused:,} refused, {arrived:,} arrive; "
            f"{overhead:.0f} bytes of overhead each with {count:,} held",
            met=bound + refused == count and arrived == bound and overhead <= 400,
        )
    with Broker(_KEEPS_ALL, verbose=False) as broker:
        client = contender.make(client_name, broker.url, "outage", contender.Settings())
        client.connect()
        broker.kill()
        before = _resident()
        kept = client.submit_all(_TOPIC, repeat(_DATA, count))
        grown = _resident() - before
    return Outcome(f"{kept:,} kept, +{grown / 1e6:,.0f} MB")


def _overhead(client_name: str, count: int) -> float:
    """Resident bytes per message beyond its topic and payload, with room for all, and every receipt kept."""
    with Broker(verbose=False) as broker:
        client = _ours(client_name, broker, max_queued=count, max_queued_bytes=1 << 30)
        broker.kill()
        eventually(lambda: not client.client.connected)
        before = _resident()
        receipts = client.receipts_of(_TOPIC, repeat(_DATA, count))
        grown = _resident() - before
        assert len(receipts) == count
        queued_bytes: int = client.client.stats().queued_bytes
        client.close(0.1)
    return (grown - queued_bytes) / len(receipts)


def _bound(client_name: str, count: int) -> tuple[int, int, int]:
    """Kept, refused, and arrived when the broker is back."""
    bound = min(10_000, count // 2)
    with Broker(_KEEPS_ALL, verbose=False) as broker:
        client = _ours(client_name, broker, max_queued=bound)
        broker.kill()
        eventually(lambda: not client.client.connected)
        receipts = client.receipts_of(_TOPIC, repeat(_DATA, count))
        broker.start()
        with _counted(broker) as arrived:
            eventually(lambda: all(receipt.done() for receipt in receipts), _PATIENCE, interval=0.2)
            eventually(lambda: len(arrived) >= len(receipts), interval=0.1)
        client.close()
    return len(receipts), count - len(receipts), len(arrived)


def in_outbox(client_name: str, quick: bool) -> Outcome:
    count = 2_000 if quick else 200_000
    with Broker(_KEEPS_ALL, verbose=False) as broker, tempfile.TemporaryDirectory() as directory:
        client = _ours(client_name, broker, outbox=str(Path(directory) / "outbox.db"))
        broker.kill()
        eventually(lambda: not client.client.connected)
        before = _resident()
        refused = 0
        for _ in range(count // _BATCH):  # whose receipts nobody keeps
            refused += _BATCH - client.submit_all(_TOPIC, repeat(_DATA, _BATCH))
        grown = _resident() - before
        kept = client.queued
        broker.start()
        with _counted(broker) as arrived:
            eventually(lambda: len(arrived) >= kept, _PATIENCE, interval=0.1)
        client.close()
    return Outcome(
        f"{kept:,} kept, {refused:,} refused, {len(arrived):,} arrive; +{grown / 1e6:.0f} MB",
        met=kept == count == len(arrived) and grown <= 20e6,
    )


def _ours(client_name: str, broker: Broker, **settings: Any) -> contender.Ours:
    # Its delays leave time to subscribe before it is back.
    made = contender.make(
        client_name,
        broker.url,
        "outage",
        contender.Settings(min_delay=2.0, max_delay=4.0, window=64, ours=settings),
    )
    assert isinstance(made, contender.Ours)
    made.connect()
    return made


def _resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _counted(broker: Broker) -> Iterator[list[None]]:
    """Has one item for each message that the broker hands on from now on."""
    arrived: list[None] = []
    subscribed = threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, "outage-counter")
    client.on_message = lambda *_: arrived.append(None)
    client.on_subscribe = lambda *_: subscribed.set()
    client.connect(broker.host, broker.port)
    client.loop_start()
    client.subscribe(_TOPIC, 1)
    assert subscribed.wait(10), "the broker does not answer"
    yield arrived
    client.disconnect()
    client.loop_stop()
