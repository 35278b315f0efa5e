"""How throughput grows with processes that share a subscription: ``scripts/bench/run --processes 1,2,3``.

Each process is a service of its own, whose handler keeps the processor busy for a while, as parsing,
checking and storing do. They subscribe to the same ``$share`` filter, and the broker deals messages out.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from bench.broker import Broker
from bench.event import TYPE, data, encode
from bench.process import Process
from tars_mqtt import Envelope, MQTTClient

WORK = 100e-6
"""Processor seconds that the handler takes for a message."""

_FILTER = "$share/bench/bench/+/event"
_FAR_WINDOW = 1_000
_TIMEOUT = 60.0


def throughput(mosquitto: str, far: list[str], processes: int, messages: int) -> float:
    """Messages per second that so many processes handle together, acknowledged after the handler."""
    context = multiprocessing.get_context("spawn")
    # One each: a counter that all write to would be the limit.
    counts = [context.Value("L", 0) for _ in range(processes)]
    with Broker(mosquitto) as broker:
        workers = [
            context.Process(target=_serve, args=(broker.port, number, count), daemon=True)
            for number, count in enumerate(counts)
        ]
        command = [*far, "publish", str(broker.port), str(messages), "1", "1", str(_FAR_WINDOW)]
        with Process(command, _TIMEOUT) as publisher:
            publisher.tell(encode(TYPE, data(0)).decode())
            publisher.wait_ready()
            for worker in workers:
                worker.start()
            try:
                # A handler's count is one too high until the first message.
                _wait(lambda: all(count.value for count in counts))
                publisher.tell("go")
                _wait(lambda: sum(count.value for count in counts) > processes)
                began = time.perf_counter()
                _wait(lambda: sum(count.value for count in counts) >= processes + messages)
                return messages / (time.perf_counter() - began)
            finally:
                for worker in workers:
                    worker.kill()
                    worker.join()


def table(mosquitto: str, far: list[str], numbers: Iterable[int], messages: int, rounds: int) -> str:
    """Medians for each number of processes, as Markdown."""
    lines = ["| processes | messages/s | ratio |", "|---:|---:|---:|"]
    first = 0.0
    for processes in numbers:
        rate = median(throughput(mosquitto, far, processes, messages) for _ in range(rounds))
        first = first or rate
        lines.append(f"| {processes} | {rate:,.0f} | {rate / first:.2f} |")
    return "\n".join([*lines, ""])


def _wait(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError("the processes did not handle the messages in time")
        time.sleep(0.005)


def _serve(port: int, number: int, count: Any) -> None:
    value = count.get_obj()  # only this process writes it

    def on_event(event: Envelope) -> None:
        until = time.thread_time() + WORK
        while time.thread_time() < until:
            pass
        value.value += 1

    client = MQTTClient(f"mqtt://127.0.0.1:{port}", f"bench-{number}")
    client.subscribe(_FILTER, on_event, qos=1)
    client.connect()
    value.value += 1
    client.run()
