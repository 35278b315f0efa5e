"""TCP ports that a broker can leave and take again."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
import threading
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

HOST = "127.0.0.1"
DEFAULT_PORT = 1883


_given: set[int] = set()
_giving = threading.Lock()


def free_port() -> int:
    """A port of this machine that nobody listens on, and that no other test is given while this process lives.

    A broker that a test has stopped wants its port back: no other may have it meanwhile.

    It is below the range that systems give to outgoing connections (from 32,768 on Linux, 49,152 elsewhere).
    In that range a client that dials a stopped broker again and again can be given the broker's own port for
    its end, and is then connected to itself.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with _giving:
            if port in _given or not _reserve(port):
                continue
            _given.add(port)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


def _reserve(port: int) -> bool:
    """Lock this port's byte of a file that all processes share; the system unlocks it when this one ends."""
    try:
        fcntl.lockf(_reservations(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


@cache
def _reservations() -> int:
    path = Path(tempfile.gettempdir()) / f"tars-mqtt-ports-{os.getuid()}"
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def is_listening(host: str, port: int, timeout: float = 1.0) -> bool:
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError:
        return False
    return True


def address_of(url: str) -> tuple[str, int]:
    """Host and port of a broker's URL."""
    parts = urlsplit(url)
    return parts.hostname or HOST, parts.port or DEFAULT_PORT
