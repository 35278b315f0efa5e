"""The workloads, for clients whose calls block."""

from __future__ import annotations

import queue
import threading
import time
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from bench.event import TOPIC, TYPE, data
from bench.job import Arrivals, Job, Meter, Trips, ready, report, wait_for_word

THREADS = 16


class ThreadedClient(ABC):
    """What each client says in its own words, and the workloads in those terms."""

    publish: Callable[..., Any]
    """``publish(topic, event_type, data, *, qos=0)`` makes an envelope; QoS 1 waits for the broker."""

    submit: Callable[..., Any]
    """The same without waiting; returns what `wait` takes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.note = "x" * job.padding

    @abstractmethod
    def connect(self, handle: Callable[[Any], None] | None = None) -> None:
        """Connect; have the handler called with each decoded envelope, on each of the job's filters."""

    @abstractmethod
    def wait(self, receipt: Any) -> None:
        """Wait for the acknowledgement."""

    @abstractmethod
    def leave(self) -> None:
        """Disconnect when everything has been handed to the network."""

    def work(self) -> None:
        getattr(self, f"run_{self.job.run}")()

    # -- workloads --------------------------------------------------------------------------

    def run_connect(self) -> None:
        self.connect(lambda envelope: None)
        ready()

    def run_publish(self) -> None:
        job = self.job
        self.connect()
        ready()
        meter = Meter(job.messages)
        for number in range(job.messages):
            self.publish(TOPIC, TYPE, data(number, self.note))
        self.leave()
        meter.report()

    def run_window(self) -> None:
        job = self.job
        self.connect()
        ready()
        meter = Meter(job.messages)
        receipts = [
            self.submit(TOPIC, TYPE, data(number, self.note), qos=1) for number in range(job.messages)
        ]
        for receipt in receipts:
            self.wait(receipt)
        meter.report()

    def run_sequential(self) -> None:
        job = self.job
        self.connect()
        ready()
        meter = Meter(job.messages)
        for number in range(job.messages):
            self.publish(TOPIC, TYPE, data(number, self.note), qos=1)
        meter.report()

    def run_threads(self) -> None:
        job = self.job
        share = job.messages // THREADS

        def publish_share() -> None:
            for number in range(share):
                self.publish(TOPIC, TYPE, data(number, self.note), qos=job.qos)

        self.connect()
        ready()
        meter = Meter(share * THREADS)
        threads = [threading.Thread(target=publish_share) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.leave()
        meter.report()

    def run_receive(self) -> None:
        done = threading.Event()
        arrivals = Arrivals(self.job.messages, done.set)
        self.connect(arrivals)
        arrivals.start()
        ready()
        done.wait()
        arrivals.report()

    def run_round_trip(self) -> None:
        job = self.job
        handled: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.connect(lambda envelope: handled.put(None))
        ready()
        trips = Trips()
        for number in range(job.messages):
            trips.leave()
            self.publish(TOPIC, TYPE, data(number, self.note), qos=job.qos)
            handled.get()
            trips.come_back()
        trips.report()

    def run_queue(self) -> None:
        job = self.job
        self.connect()
        ready()
        wait_for_word()
        tracemalloc.start()
        receipts = [
            self.submit(TOPIC, TYPE, data(number, self.note), qos=1) for number in range(job.messages)
        ]
        time.sleep(0.2)  # what the client does on its own threads with the first of them
        report(bytes=tracemalloc.get_traced_memory()[0] / len(receipts))
