"""Where a client stands, and waiting for it to stand elsewhere."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable


class ConnectionState(enum.Enum):
    """Where a client stands. ``client.state`` is one of these.

    Attributes:
        NEW: Made, and never connected.
        CONNECTING: `connect` is at work.
        CONNECTED: The connection is up, and the subscriptions are acknowledged.
        RECONNECTING: The connection is lost, and the next one is being tried for.
        CLOSING: `shutdown` is at work.
        DISCONNECTED: After `disconnect`, or a `connect` that failed.
        CLOSED: After `shutdown`.
    """

    NEW = "new"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    CLOSING = "closing"
    DISCONNECTED = "disconnected"
    CLOSED = "closed"


TRYING = (ConnectionState.CONNECTING, ConnectionState.RECONNECTING)
"""A connection is on its way."""


class StateCell:
    """One `ConnectionState`, set by whoever makes it true and awaited by anyone.

    Any thread may read and wait. Reading takes no lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of its own: Ctrl-C cannot come between taking it and the block
        self._condition = threading.Condition(self._lock)
        self._listeners: set[Callable[[], None]] = set()
        self.value = ConnectionState.NEW

    def set(self, value: ConnectionState) -> None:
        """Change the state and wake all who wait."""
        with self._lock:
            self._change(value)
        self._tell()

    def replace(self, old: ConnectionState, new: ConnectionState) -> bool:
        """Change the state only from *old*; say whether it was so."""
        with self._lock:
            if self.value is not old:
                return False
            self._change(new)
        self._tell()
        return True

    def _change(self, value: ConnectionState) -> None:
        self.value = value
        self._condition.notify_all()

    def _tell(self) -> None:
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Have *listener* called after each change, on the thread that made it; it must not block."""
        with self._lock:
            self._listeners.add(listener)

    def ignore(self, listener: Callable[[], None]) -> None:
        """Undo `listen`."""
        with self._lock:
            self._listeners.discard(listener)

    def wait(self, predicate: Callable[[ConnectionState], bool], timeout: float | None) -> bool:
        """Wait until *predicate* holds for the state; False when the time ran out first."""
        with self._lock:
            return self._condition.wait_for(lambda: predicate(self.value), timeout)
