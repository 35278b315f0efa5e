"""The workloads, for asyncio clients."""

from __future__ import annotations

import asyncio
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

from bench.event import TOPIC, TYPE, data
from bench.job import Arrivals, Job, Meter, Trips, ready, report, wait_for_word


class LoopedClient(ABC):
    """What each client says in its own words, and the workloads in those terms."""

    publish: Callable[..., Awaitable[Any]]
    """``publish(topic, event_type, data, *, qos=0)`` makes an envelope; QoS 1 waits for the broker."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.note = "x" * job.padding

    @abstractmethod
    async def connect(self, handle: Callable[[Any], None] | None = None) -> None:
        """Connect; have the handler called with each decoded envelope, on each of the job's filters."""

    @abstractmethod
    async def leave(self) -> None:
        """Disconnect when everything has been handed to the network."""

    async def publish_all(self) -> None:
        """Publish the job's messages with QoS 0."""
        await self._publish_side_by_side(0)

    async def publish_window(self) -> None:
        """Publish the job's messages with QoS 1, a window of them at once, until all are acknowledged."""
        await self._publish_side_by_side(1)

    async def _publish_side_by_side(self, qos: int) -> None:
        numbers = iter(range(self.job.messages))

        async def publish_some() -> None:
            for number in numbers:
                await self.publish(TOPIC, TYPE, data(number, self.note), qos=qos)

        # Where each call waits for the network, one after the other would be slower with QoS 0, too.
        await asyncio.gather(*(publish_some() for _ in range(self.job.window)))

    async def enqueue(self) -> list[Any]:
        """Publish with QoS 1 to a broker that does not answer; returns what a user keeps."""
        job = self.job
        return [
            asyncio.ensure_future(self.publish(TOPIC, TYPE, data(number, self.note), qos=1))
            for number in range(job.messages)
        ]

    def work(self) -> None:
        asyncio.run(getattr(self, f"run_{self.job.run}")())

    # -- workloads --------------------------------------------------------------------------

    async def run_connect(self) -> None:
        await self.connect(lambda envelope: None)
        ready()

    async def run_publish(self) -> None:
        await self.connect()
        ready()
        meter = Meter(self.job.messages)
        await self.publish_all()
        await self.leave()
        meter.report()

    async def run_window(self) -> None:
        await self.connect()
        ready()
        meter = Meter(self.job.messages)
        await self.publish_window()
        meter.report()

    async def run_sequential(self) -> None:
        job = self.job
        await self.connect()
        ready()
        meter = Meter(job.messages)
        for number in range(job.messages):
            await self.publish(TOPIC, TYPE, data(number, self.note), qos=1)
        meter.report()

    async def run_receive(self) -> None:
        done = asyncio.Event()
        arrivals = Arrivals(self.job.messages, done.set)
        await self.connect(arrivals)
        arrivals.start()
        ready()
        await done.wait()
        arrivals.report()

    async def run_round_trip(self) -> None:
        job = self.job
        handled = asyncio.Event()
        await self.connect(lambda envelope: handled.set())
        ready()
        trips = Trips()
        for number in range(job.messages):
            trips.leave()
            await self.publish(TOPIC, TYPE, data(number, self.note), qos=job.qos)
            await handled.wait()
            trips.come_back()
            handled.clear()
        trips.report()

    async def run_queue(self) -> None:
        await self.connect()
        ready()
        wait_for_word()
        tracemalloc.start()
        kept = await self.enqueue()
        await asyncio.sleep(0.2)  # tasks take their first step
        report(bytes=tracemalloc.get_traced_memory()[0] / len(kept))
