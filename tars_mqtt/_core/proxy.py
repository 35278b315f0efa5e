"""Reaching a broker through a proxy: SOCKS 5 [RFC 1928], [RFC 1929], and CONNECT of HTTP [RFC 9110, 9.3.6]."""

from __future__ import annotations

import base64
import ipaddress
import socket

from tars_mqtt._core.dial import LastingError, dial, reason_of
from tars_mqtt._core.exchange import Exchange
from tars_mqtt._core.limit import Limit
from tars_mqtt.errors import ConnectError
from tars_mqtt.url import BrokerURL

_NO_LOGIN, _PASSWORD, _NOTHING_OFFERED = 0, 2, 0xFF
_CONNECT = 1
_IPV4, _NAME, _IPV6 = 1, 3, 4
_REFUSALS = {
    1: "general failure",
    2: "its rules do not allow it",
    3: "network unreachable",
    4: "host unreachable",
    5: "connection refused",
    6: "time to live expired",
    7: "it does not know CONNECT",
    8: "it does not know this type of address",
}


class _LoginRefusedError(Exception):
    """The proxy does not let us in; waiting does not help."""


class _RefusedError(Exception):
    """The proxy has no connection for us."""


def dial_through(proxy: BrokerURL, url: BrokerURL, limit: Limit) -> socket.socket:
    """Return a non-blocking socket that the proxy has connected with the broker, whose name it resolves.

    Raises:
        ConnectError: The proxy does not answer, or has no connection for us; says why.
        Interrupted: The attempt was called off.
    """
    sock = dial(proxy, limit)
    try:
        exchange = Exchange(sock, limit)
        (_socks if proxy.scheme == "socks5" else _http)(exchange, proxy, url)
    except BaseException as error:
        sock.close()
        failed = f"cannot reach {url} through the proxy {proxy}: "
        if isinstance(error, _LoginRefusedError):
            raise LastingError(f"{failed}{error}; check user name and password in proxy") from None
        if isinstance(error, _RefusedError):
            raise ConnectError(f"{failed}{error}") from None
        if isinstance(error, OSError):
            raise ConnectError(f"{failed}{reason_of(error)}") from error
        raise
    return sock


def _socks(exchange: Exchange, proxy: BrokerURL, url: BrokerURL) -> None:
    methods = bytes((_NO_LOGIN,) if proxy.username is None else (_NO_LOGIN, _PASSWORD))
    exchange.send(bytes((5, len(methods))) + methods)
    version, method = exchange.receive(2)
    if version != 5:
        raise _RefusedError("the peer does not speak SOCKS 5; check scheme and port of proxy")
    if method == _PASSWORD and proxy.username is not None:
        exchange.send(b"\1" + _short(proxy.username.encode()) + _short((proxy.password or "").encode()))
        if exchange.receive(2)[1]:
            raise _LoginRefusedError("it refused the user name or the password")
    elif method != _NO_LOGIN:
        raise _LoginRefusedError("it wants a login that we do not have")
    exchange.send(bytes((5, _CONNECT, 0)) + _destination(url.host) + url.port.to_bytes(2))
    _, code, _, kind = exchange.receive(4)
    if code:
        raise _RefusedError(_REFUSALS.get(code, f"unknown reason {code}"))
    size = {_IPV4: 4, _IPV6: 16}.get(kind) or exchange.receive(1)[0]
    exchange.receive(size + 2)  # the proxy's own address and port, of which we make no use


def _destination(host: str) -> bytes:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return bytes((_NAME,)) + _short(host.encode("idna"))
    return bytes((_IPV4 if address.version == 4 else _IPV6,)) + address.packed


def _short(text: bytes) -> bytes:
    return bytes((len(text),)) + text


def _http(exchange: Exchange, proxy: BrokerURL, url: BrokerURL) -> None:
    host = f"[{url.host}]" if ":" in url.host else url.host.encode("idna").decode()
    lines = [f"CONNECT {host}:{url.port} HTTP/1.1", f"Host: {host}:{url.port}"]
    if proxy.username is not None:
        login = f"{proxy.username}:{proxy.password or ''}".encode()
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(login).decode()}")
    exchange.send("\r\n".join([*lines, "", ""]).encode())
    head, rest = exchange.receive_head()
    status = head.partition(b"\r\n")[0].decode("latin-1")
    protocol, _, outcome = status.partition(" ")
    if protocol not in ("HTTP/1.1", "HTTP/1.0"):
        raise _RefusedError("the peer does not speak HTTP; check scheme and port of proxy")
    if outcome.startswith("407"):
        raise _LoginRefusedError(f"it answers {status[:100]!r}")
    if not outcome.startswith("2"):
        raise _RefusedError(f"it answers {status[:100]!r}")
    if rest:
        raise _RefusedError("it sent more than its answer, before we had said anything")
