"""The network thread: its start and its end, and what others have it do."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from tars_mqtt._core.transport import Transport

_MOMENT = 0.5
"""Seconds that the thread needs to end after the deadline of its goodbye."""


class NetworkThread:
    """Runs the story of the connection. `start` and `leave` bracket one life of it; it can be started again.

    Any thread, but for `run_commands`.
    """

    def __init__(self, transport: Transport, client_id: str) -> None:
        self._transport = transport
        self._name = f"tars-mqtt/{client_id}/network"
        self._commands: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        # Not asked of the thread: Python 3.11 takes one for dead whose `join` was interrupted.
        self._ended = threading.Event()
        self._starting = False
        self.leave_by: float | None = None
        """When the goodbye must be said, on the monotonic clock; None as long as nobody wants it to end."""

    def start(self, story: Callable[[], None]) -> None:
        """Run *story*, which ends soon once there is a `leave_by`, and closes the transport.

        Raises:
            OSError, RuntimeError: There are no more descriptors, or no more threads; nothing was started.
        """
        self.leave_by = None
        self._transport.start()
        self._starting = True
        self._ended = ended = threading.Event()

        def run() -> None:
            try:
                story()
            finally:
                ended.set()

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        try:
            self._thread.start()
        except (OSError, RuntimeError, MemoryError):  # not of Ctrl-C, which comes when it runs already
            self._thread = None
            self._transport.close()
            raise
        finally:
            self._starting = False

    def interrupt(self) -> None:
        """Have it end, and do not wait for it. For signal handlers too."""
        self.leave_by = time.monotonic()
        self._transport.wake()

    def leave(self, timeout: float, patience: float = math.inf) -> bool:
        """Have it say goodbye within *timeout*, and end; False when it has not, after *patience* at most."""
        thread = self._thread
        if thread is None:
            return True
        self.leave_by = time.monotonic() + timeout
        self._transport.wake()
        if thread.ident is None:
            return False  # about to start, and to end at once
        if not self._ended.wait(min(timeout + _MOMENT, patience)):
            return False
        thread.join(_MOMENT)
        if self._thread is thread:
            self._thread = None
        self.run_commands()  # what came when it had looked for the last time
        return True

    @property
    def running(self) -> bool:
        """Whether there is one."""
        return self._thread is not None and (self._starting or not self._ended.is_set())

    @property
    def leaving(self) -> bool:
        """Whether there is one that is about to end."""
        return self.running and self.leave_by is not None

    def call(self, command: Callable[[], None]) -> None:
        """Have *command* run on it, now or when there is one again. Takes no lock."""
        self._commands.append(command)
        self._transport.wake()

    def run_commands(self) -> None:
        """Run what others have asked for. Network thread, or who has seen it end."""
        while self._commands:
            try:
                command = self._commands.popleft()
            except IndexError:  # another has seen it end, too
                return
            command()
