"""What a worker process is told to do, and how it measures that. Imports little: its start is measured."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Job(NamedTuple):
    """One workload for one client."""

    adapter: str
    run: str
    port: int
    messages: int
    qos: int
    filters: int
    window: int
    padding: int
    settings: dict[str, Any]

    @property
    def topic_filters(self) -> list[str]:
        return [f"bench/{number:05}/+" for number in range(self.filters)]


def ready() -> None:
    """Tell the other side that the client is connected."""
    say("ready")


def wait_for_word() -> None:
    """Wait until the other side is ready, too."""
    sys.stdin.readline()


def report(**metrics: float) -> None:
    say(json.dumps(metrics))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Meter:
    """Clocks that run from its making."""

    def __init__(self, messages: int) -> None:
        self._messages = messages
        self._began = time.time()
        self._cpu = time.process_time()
        self._start = time.perf_counter()

    def report(self, **metrics: float) -> None:
        """Stop the clocks and tell what they say."""
        elapsed = time.perf_counter() - self._start
        cpu = time.process_time() - self._cpu
        rate = self._messages / elapsed
        report(rate=rate, cpu=cpu / self._messages * 1e6, began=self._began, **metrics)


class Arrivals:
    """A handler that counts and does no more; *done* is called at the last message."""

    def __init__(self, messages: int, done: Callable[[], object]) -> None:
        self._messages = messages
        self._done = done
        self._numbers = itertools.count(1)  # handlers of several filters may run at once
        self._cpu = self._first = self._last = 0.0

    def start(self) -> None:
        """Begin: from now on messages may come."""
        self._cpu = time.process_time()

    def __call__(self, envelope: object) -> None:
        number = next(self._numbers)
        if number == 1:
            self._first = time.perf_counter()
        elif number == self._messages:
            self._last = time.perf_counter()
            self._done()

    def report(self) -> None:
        cpu = time.process_time() - self._cpu
        rate = (self._messages - 1) / (self._last - self._first)
        report(rate=rate, cpu=cpu / self._messages * 1e6)


class Trips:
    """Times one round trip after the other, as the caller sees it: until the handler has told it."""

    _WARM_UP = 0.1

    def __init__(self) -> None:
        self._cpu = time.process_time()
        self._times: list[float] = []
        self._left = 0.0

    def leave(self) -> None:
        self._left = time.perf_counter()

    def come_back(self) -> None:
        self._times.append(time.perf_counter() - self._left)

    def report(self) -> None:
        cpu = time.process_time() - self._cpu
        times = sorted(self._times[int(len(self._times) * self._WARM_UP) :])
        report(
            p50=times[len(times) // 2] * 1e6,
            p99=times[len(times) * 99 // 100] * 1e6,
            cpu=cpu / len(self._times) * 1e6,
        )
