"""A process that publishes, or subscribes, until it is told to stop: ``python -m reliability.worker JOB``.

It tells by lines: ``ready`` when it is connected, ``stopped`` when all that it published is acknowledged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from reliability import contender, journal
from tars_mqtt import QueueFullError

TOPIC = "soak"

_WORK = 0.001
"""Seconds that an event takes to handle: time for a kill to come in between."""


class Job(NamedTuple):
    """What one process is for."""

    role: str
    client: str
    url: str
    name: str
    number: int
    journal: str
    rate: float
    settings: dict[str, Any]


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    # Lost connections are what it is here for.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    client = contender.make(job.client, job.url, job.name, contender.Settings(**job.settings))
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
    if job.role == "publisher":
        publish(job, client, stop)
    else:
        subscribe(job, client, stop)


def say(word: str) -> None:
    print(word, flush=True)


def connect(client: contender.Client) -> None:
    """Connect for the first time, which may fail in a fault as it does for anybody's service."""
    while True:
        try:
            client.connect()
        except Exception as error:
            print(f"no connection yet: {error}", file=sys.stderr)
            time.sleep(0.1)
        else:
            say("ready")
            return


def subscribe(job: Job, client: contender.Client, stop: threading.Event) -> None:
    book = journal.Writer(Path(job.journal))

    def on_event(payload: bytes) -> None:
        data = json.loads(payload)["data"]
        time.sleep(_WORK)
        book.write(journal.HANDLED, data["publisher"], data["number"])

    client.subscribe(f"{TOPIC}/#", on_event)
    connect(client)
    stop.wait()
    client.close()


def publish(job: Job, client: contender.Client, stop: threading.Event) -> None:
    path = Path(job.journal)
    number = journal.last_tried(path) + 1
    book = journal.Writer(path)
    receipts: queue.SimpleQueue[tuple[int, contender.Receipt] | None] = queue.SimpleQueue()

    def note_acknowledgements() -> None:
        while (waiting := receipts.get()) is not None:
            number, receipt = waiting
            while True:
                with contextlib.suppress(TimeoutError):
                    receipt.result(5)
                    break
            book.write(journal.ACKNOWLEDGED, number)

    noting = threading.Thread(target=note_acknowledgements, daemon=True)
    noting.start()
    connect(client)
    while not stop.wait(1 / job.rate):
        book.write(journal.TRIED, number)
        try:
            receipt = client.submit(f"{TOPIC}/{job.number}", {"publisher": job.number, "number": number})
        except QueueFullError:
            continue
        book.write(journal.ACCEPTED, number)
        receipts.put((number, receipt))
        number += 1
    receipts.put(None)
    noting.join()
    while client.queued:  # what a process before this one left in the outbox has no receipts here
        time.sleep(0.02)
    say("stopped")
    client.close()


if __name__ == "__main__":
    main()
