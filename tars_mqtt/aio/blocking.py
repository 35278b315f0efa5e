"""Calls that block, beside the loop: on threads of our own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_THREADS = 4


class BlockingCalls:
    """Has calls made on threads of ours: the loop's default executor may be full of other work.

    Belongs to the loop's thread.
    """

    def __init__(self, client_id: str) -> None:
        self._name = f"tars-mqtt/{client_id}/blocking"
        self._executor: ThreadPoolExecutor | None = None
        self._under_way: set[asyncio.Future[Any]] = set()

    def start(self, loop: asyncio.AbstractEventLoop, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Begin a call. What it gives is no task: a loop that ends cancels all of those."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix=self._name)
        work = loop.run_in_executor(self._executor, call, *args)
        self._under_way.add(work)
        work.add_done_callback(self._under_way.discard)
        return work

    def release(self) -> None:
        """End the threads, when they have done their work; the next call has new ones."""
        executor, self._executor = self._executor, None
        if executor is not None:
            # What has done its work takes some microseconds to end: then no thread is left behind.
            executor.shutdown(wait=all(call.done() for call in self._under_way))


async def to_the_end(work: asyncio.Future[T]) -> T:
    """Await *work*; a cancellation of the waiting task is delivered when it is done."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError as error:
            if work.cancelled():
                raise
            cancelled = error
        except Exception:  # told below
            break
    if cancelled is not None:
        with contextlib.suppress(Exception):
            work.result()
        raise cancelled
    return work.result()
