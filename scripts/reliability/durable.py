"""How fast events are on disk."""

from __future__ import annotations

import asyncio
import tempfile
import time
from itertools import repeat
from pathlib import Path

from reliability import contender
from reliability.outcome import Outcome
from tests.support import Broker
from tests.support.thread import in_thread

_TOPIC = "durable"
_DATA = {"number": 12345, "note": "x" * 60}


def rates(client_name: str, quick: bool) -> Outcome:
    """With a broker that acknowledges meanwhile, so that acknowledged events are deleted, too."""
    count = 320 if quick else 9_600
    with Broker(verbose=False) as broker, tempfile.TemporaryDirectory() as directory:
        made = contender.make(
            client_name,
            broker.url,
            "durable",
            contender.Settings(window=64, ours={"outbox": str(Path(directory) / "outbox.db")}),
        )
        assert isinstance(made, contender.Ours)
        made.connect()
        found = {}
        if client_name == "threads":
            for threads in (1, 4, 16):
                found[f"{threads} threads" if threads > 1 else "1 thread"] = _threads(made, threads, count)
        else:
            found["`submit_event`"] = _rate(count, lambda: made.submit_all(_TOPIC, repeat(_DATA, count)))
            found["`publish_event` in 64 tasks"] = _rate(
                count, lambda: made.on_loop(lambda: _tasks(made, 64, count))
            )
        made.close()
    return Outcome(
        ", ".join(f"{rate:,.0f} by {how}" for how, rate in found.items()),
        met=quick or max(found.values()) >= 3_000,
    )


def _rate(count: int, work: object) -> float:
    began = time.perf_counter()
    work()  # type: ignore[operator]
    return count / (time.perf_counter() - began)


def _threads(client: contender.Ours, threads: int, count: int) -> float:
    def all_at_once() -> None:
        running = [
            in_thread(client.submit_all, _TOPIC, repeat(_DATA, count // threads)) for _ in range(threads)
        ]
        for each in running:
            each.result(60)

    return _rate(count, all_at_once)


async def _tasks(client: contender.Ours, tasks: int, count: int) -> None:
    publish = client.client.unwrapped.publish_event

    async def some() -> None:
        for _ in range(count // tasks):
            await publish(_TOPIC, contender.EVENT_TYPE, _DATA, qos=1)

    await asyncio.gather(*(some() for _ in range(tasks)))
