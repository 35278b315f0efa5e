"""A few bytes there and back before a connection speaks MQTT, within a deadline and interruptibly."""

from __future__ import annotations

import selectors
import socket

from tars_mqtt._core.dial import await_ready
from tars_mqtt._core.limit import Limit

_MOST_HEAD_BYTES = 16_384
"""Of an HTTP answer."""

_NOT_READY = (BlockingIOError, InterruptedError)


class Exchange:
    """Talks on a connected, non-blocking socket. Its methods raise `OSError`, and `Interrupted`."""

    def __init__(self, sock: socket.socket, limit: Limit) -> None:
        self._socket = sock
        self._limit = limit

    def send(self, data: bytes) -> None:
        """Send all of *data*."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except _NOT_READY:
                await_ready(self._socket, selectors.EVENT_WRITE, self._limit)

    def receive(self, count: int) -> bytes:
        """Exactly *count* bytes."""
        data = b""
        while len(data) < count:
            data += self._receive_some(count - len(data), data)
        return data

    def receive_head(self) -> tuple[bytes, bytes]:
        """The head of an HTTP answer, or its first part where it does not end, and what came behind it."""
        data = b""
        while True:
            head, end, rest = data.partition(b"\r\n\r\n")
            if end:
                return head, rest
            if len(data) > _MOST_HEAD_BYTES:
                return data, b""
            data += self._receive_some(4096, data)

    def _receive_some(self, most: int, before: bytes) -> bytes:
        while True:
            try:
                received = self._socket.recv(most)
            except _NOT_READY:
                await_ready(self._socket, selectors.EVENT_READ, self._limit)
                continue
            if not received:
                where = " in the middle of its answer" if before else ""
                raise ConnectionAbortedError(f"the peer hung up{where}")
            return received
