"""Opening the socket that a connection lives on, within a deadline and interruptibly."""

from __future__ import annotations

import errno
import os
import selectors
import socket
from typing import Any

from tars_mqtt._core.limit import Limit
from tars_mqtt.errors import ConnectError
from tars_mqtt.url import BrokerURL

_PATIENCE = 0.05
"""Seconds between two looks at whether the attempt was called off."""


class LastingError(ConnectError):
    """Trying again will not cure it: somebody must mend a file, a setting or the broker first."""


def dial(url: BrokerURL, limit: Limit) -> socket.socket:
    """Return a connected, non-blocking socket.

    Every address of the host is tried in turn. Name resolution has no time-out of its own, which
    is why this runs on the network thread and never on a caller's.

    Args:
        url: Where to.
        limit: Shared evenly among the addresses left to try.

    Raises:
        ConnectError: Nobody answered; says who was asked and why not.
        Interrupted: The attempt was called off.
    """
    candidates = [(int(socket.AF_UNIX), url.path)] if url.transport == "unix" else _resolve(url)
    failures: list[tuple[str, str]] = []
    for number, (family, address) in enumerate(candidates):
        try:
            return _connect(family, address, limit.share(len(candidates) - number))
        except OSError as error:
            failures.append((_name(address), reason_of(error)))
    reasons = [reason if len(failures) == 1 else f"{name}: {reason}" for name, reason in failures]
    raise ConnectError(f"cannot reach {url}: {'; '.join(reasons)}")


def _resolve(url: BrokerURL) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConnectError(f"cannot resolve the host {url.host!r}: {reason_of(error)}") from error
    return [(family, address) for family, _, _, _, address in found]


def _connect(family: int, address: Any, limit: Limit) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(address)
        if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            await_ready(sock, selectors.EVENT_WRITE, limit)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def await_ready(sock: socket.socket, event: int, limit: Limit) -> None:
    """Wait until *sock* is ready for *event*.

    Raises:
        TimeoutError: The time is up.
        Interrupted: The attempt was called off.
    """
    # DefaultSelector, not select(): a descriptor above 1023 breaks the latter.
    with selectors.DefaultSelector() as selector:
        selector.register(sock, event)
        while True:
            remaining = limit.left()
            if remaining <= 0:
                raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
            if selector.select(min(remaining, _PATIENCE)):
                return


def _name(address: object) -> str:
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return str(address)


def reason_of(error: Exception) -> str:
    """What went wrong, in the words of the operating system, or of OpenSSL."""
    if not isinstance(error, OSError):
        return str(error).lower()
    if reason := getattr(error, "reason", None):  # of an ssl.SSLError
        return str(reason).replace("_", " ").lower()
    return (error.strerror or str(error)).lower()
