"""Proxies as companies have them: SOCKS 5 and CONNECT of HTTP, each as large as a test needs it."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Literal

from tests.support.port import HOST, free_port

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

Kind = Literal["socks5", "http"]


class Tunnel:
    """A proxy that passes bytes between a client and where that wants to go.

    Args:
        kind: What it speaks.
        login: User name and password, without which nobody passes.
        answer: Bytes to say in place of a good answer to the first request; empty for none at all.

    Attributes:
        asked: Where clients wanted to go, as host and port.
    """

    def __init__(self, kind: Kind, login: tuple[str, str] | None = None, answer: bytes | None = None) -> None:
        self.port = free_port()
        user = "" if login is None else f"{login[0]}:{login[1]}@"
        self.url = f"{kind}://{user}{HOST}:{self.port}"
        self.asked: list[tuple[str, int]] = []
        self._negotiate = self._socks if kind == "socks5" else self._http
        self._login = login
        self._answer = answer
        self._listener = socket.create_server((HOST, self.port))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def cut(self) -> None:
        """End all connections."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                self._start(self._serve, client)

    def _start(self, target: object, *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            if self._answer is not None:
                client.recv(4096)
                client.sendall(self._answer)
                _pump(client, client, keep=True)
            elif self._negotiate(client):
                upstream = socket.create_connection(self.asked[-1])
                self._sockets.append(upstream)
                self._confirm(client)
                self._start(_pump, upstream, client)
                _pump(client, upstream)
        client.close()

    def _socks(self, client: socket.socket) -> bool:
        _, count = _exactly(client, 2)
        methods = _exactly(client, count)
        method = 2 if self._login else 0
        client.sendall(bytes((5, method if method in methods else 0xFF)))
        if method not in methods:
            return False
        if self._login:
            _exactly(client, 1)
            login = _short(client), _short(client)
            client.sendall(bytes((1, login != self._login)))
            if login != self._login:
                return False
        kind = _exactly(client, 4)[3]
        host = _short(client) if kind == 3 else socket.inet_ntoa(_exactly(client, 4))
        self.asked.append((host, int.from_bytes(_exactly(client, 2))))
        return True

    def _http(self, client: socket.socket) -> bool:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += _exactly(client, 1)
        request, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        if self._login:
            login = base64.b64encode(":".join(self._login).encode()).decode()
            if headers.get("Proxy-Authorization") != f"Basic {login}":
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return False
        method, where, _ = request.split(" ")
        assert (method, headers["Host"]) == ("CONNECT", where)
        host, _, port = where.rpartition(":")
        self.asked.append((host, int(port)))
        return True

    def _confirm(self, client: socket.socket) -> None:
        if self._negotiate == self._socks:
            client.sendall(b"\5\0\0\1" + bytes(6))
        else:
            # In two pieces, and with more than a status line: as real ones answer now and then.
            client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: a")
            client.sendall(b" proxy\r\n\r\n")


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        received = sock.recv(count - len(data))
        if not received:
            raise EOFError
        data += received
    return data


def _short(sock: socket.socket) -> str:
    return _exactly(sock, _exactly(sock, 1)[0]).decode()


def _pump(source: socket.socket, sink: socket.socket, keep: bool = False) -> None:
    """Pass bytes on until there are no more; with *keep* take them only."""
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            if not keep:
                sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
