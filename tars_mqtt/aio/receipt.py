"""What a publish gives on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

from tars_mqtt._core.timeout import seconds
from tars_mqtt.aio.loop import Bridge
from tars_mqtt.message import PublishReceipt as CoreReceipt
from tars_mqtt.message import not_acknowledged


class PublishReceipt:
    """What `MQTTClient.submit_event` returns. Awaiting it waits for the broker's acknowledgement."""

    __slots__ = ("_bridge", "_receipt")

    def __init__(self, receipt: CoreReceipt, bridge: Bridge) -> None:
        self._receipt = receipt
        self._bridge = bridge

    @property
    def envelope_id(self) -> str | None:
        """The id of the envelope; None for a raw publish."""
        return self._receipt.envelope_id

    @property
    def topic(self) -> str:
        """Where the message goes."""
        return self._receipt.topic

    @property
    def qos(self) -> int:
        """0, 1 or 2."""
        return self._receipt.qos

    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._receipt.done()

    def cancel(self) -> bool:
        """Take the message back while it is unsent; False when it is too late."""
        return self._receipt.cancel()

    def cancelled(self) -> bool:
        """Whether the message was taken back."""
        return self._receipt.cancelled()

    async def result(self, timeout: float | None = None) -> str | None:
        """Wait for the acknowledgement and return the envelope's id. Cancelling stops the wait, not the send.

        Raises:
            AckTimeoutError: It did not come within *timeout* seconds; the message is still on its way.
            PublishRejectedError, ClosedError: There will be none.
        """
        await self._wait(timeout)
        return self._receipt.result(0)

    async def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return what went wrong, None if nothing did."""
        await self._wait(timeout)
        return self._receipt.exception(0)

    def __await__(self) -> Generator[Any, None, str | None]:
        return self.result().__await__()

    async def _wait(self, timeout: float | None) -> None:
        receipt = self._receipt
        if receipt.done():
            return
        limit = seconds(timeout, 0.0)
        loop = asyncio.get_running_loop()
        if self._bridge.loop is not loop:
            raise RuntimeError("this receipt belongs to another event loop: await it there")
        future: asyncio.Future[None] = loop.create_future()

        def tell(_: CoreReceipt) -> None:
            self._bridge.post(lambda: resolve(future))

        receipt._add_done_callback(tell)
        timer = None if limit is None else loop.call_later(limit, resolve, future)
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()
            receipt._remove_done_callback(tell)
        if not receipt.done():
            raise not_acknowledged(self.topic, limit, self)


def resolve(future: asyncio.Future[None]) -> None:
    """Wake whoever awaits *future*, if it is not cancelled or resolved already."""
    if not future.done():
        future.set_result(None)
