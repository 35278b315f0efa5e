"""TCP ports that a broker can leave and take again."""

from __future__ import annotations

import random
import socket
from urllib.parse import urlsplit

HOST = "127.0.0.1"
DEFAULT_PORT = 1883


def free_port() -> int:
    """A port of this machine that nobody listens on.

    It is below the range that systems give to outgoing connections (from 32,768 on Linux, 49,152 elsewhere).
    In that range a client that dials a stopped broker again and again can be given the broker's own port for
    its end, and is then connected to itself.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


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
