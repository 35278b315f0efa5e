"""See what a test left behind: threads of the package, and open sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from pathlib import Path

from tests.support.wait import eventually

THREAD_PREFIX = "tars-mqtt/"


class LeakCheck:
    """Remembers what there is when it is made, and later tells what has been added since."""

    def __init__(self) -> None:
        self._threads = _own_threads()
        self._sockets = _open_sockets()

    def leaks(self) -> list[str]:
        """One line for each thread and each socket that is new."""
        threads = [f"thread {thread.name!r} is still running" for thread in _own_threads() - self._threads]
        sockets = [f"socket {_describe(fd)} is still open" for fd, _ in _open_sockets() - self._sockets]
        return sorted(threads + sockets)

    def assert_clean(self, grace: float = 2.0) -> None:
        """Fail if there is a leak that does not go away within *grace*."""
        eventually(
            lambda: not self.leaks(), grace, lambda: "nothing is left behind; " + "; ".join(self.leaks())
        )


def _own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(THREAD_PREFIX)}


def _open_sockets() -> set[tuple[int, int]]:
    """Descriptor and inode of each socket of this process; nothing where the system does not tell."""
    found = set()
    with contextlib.suppress(OSError):
        for path in Path("/dev/fd").iterdir():
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                status = os.fstat(int(path.name))
                if stat.S_ISSOCK(status.st_mode):
                    found.add((int(path.name), status.st_ino))
    return found


def _describe(fd: int) -> str:
    try:
        with socket.socket(fileno=os.dup(fd)) as twin:
            family = socket.AddressFamily(twin.family).name
            try:
                return f"{fd} ({family}, {twin.getsockname()} to {twin.getpeername()})"
            except OSError:
                return f"{fd} ({family}, {twin.getsockname()}, not connected)"
    except OSError:
        return str(fd)
