"""Waiting on a loop for room on the way out, without a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from tars_mqtt._core.backlog import Backlog
from tars_mqtt._core.crowd import PACE_TIME
from tars_mqtt.aio.loop import Bridge
from tars_mqtt.aio.receipt import resolve
from tars_mqtt.errors import QueueFullError, TarsMQTTError

T = TypeVar("T")


class Room:
    """What the publishers of one loop wait for. Runs on the loop; what makes room tells it over the bridge."""

    def __init__(self, backlog: Backlog, bridge: Bridge) -> None:
        self._backlog = backlog
        self._bridge = bridge

    async def submit(
        self, submit: Callable[[], T], qos: int, error: QueueFullError, limit: float | None
    ) -> T:
        """Submit what was refused with *error* again, waiting for room as long as *limit* allows."""
        if limit == 0 or not error.retriable:
            raise error
        bounds = self._backlog.bounds(qos)
        loop = asyncio.get_running_loop()
        deadline = None if limit is None else loop.time() + limit
        in_time = False
        while True:
            called = in_time
            room: asyncio.Future[None] = loop.create_future()
            tell = partial(self._bridge.post, partial(resolve, room))
            timer = None if deadline is None else loop.call_at(deadline, resolve, room)
            in_time = False
            bounds.when_room(tell)
            try:
                # Room may have come free between the refusal and the registration.
                return submit()
            except QueueFullError:
                bounds.pass_on()
                await room
                in_time = deadline is None or loop.time() < deadline
            except TarsMQTTError:
                if called:
                    bounds.call_back(1)  # the place is not wanted any more
                raise
            finally:
                if timer is not None:
                    timer.cancel()
                if not in_time:
                    # Others wait for the same call.
                    bounds.never_mind(tell)
            if not in_time:
                return submit()

    async def pace(self) -> None:
        """Let the network thread catch up with large messages, but not for long."""
        if not self._backlog.joins_a_crowd():
            return
        loop = asyncio.get_running_loop()
        left: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(PACE_TIME, resolve, left)
        tell = partial(self._bridge.post, partial(resolve, left))
        self._backlog.crowd.when_gone(tell)
        try:
            await left
        finally:
            timer.cancel()
            self._backlog.crowd.never_mind(tell)
