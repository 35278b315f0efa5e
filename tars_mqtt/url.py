"""Where a broker is, and how to reach it: ``mqtt``, ``mqtts``, ``ws``, ``wss`` and ``mqtt+unix`` URLs.

No error of this module quotes any piece of the text it was given. In a malformed URL every piece may belong
to the password: in ``mqtt://user:secret`` it stands where the port should be.
"""

from __future__ import annotations

import re
from typing import Final, Literal, Self
from urllib.parse import quote, unquote, unquote_to_bytes

import attrs

from tars_mqtt.topics import MAX_STRING_BYTES

__all__ = ["BrokerURL", "parse_proxy", "parse_urls"]

_DEFAULT_PORTS: Final = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443, "mqtt+unix": 0}
_OTHER_NAMES: Final = {
    "tcp": "mqtt",
    "mqtt+tcp": "mqtt",
    "ssl": "mqtts",
    "tls": "mqtts",
    "mqtt+ssl": "mqtts",
    "mqtt+tls": "mqtts",
    "http": "ws",
    "mqtt+ws": "ws",
    "https": "wss",
    "mqtt+wss": "wss",
    "unix": "mqtt+unix",
}
_MAX_PROXY_BYTES: Final = 255  # of the same, in SOCKS [RFC 1929]
_PARTS: Final = re.compile(r"([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?")  # RFC 3986, appendix B, after "://"
_ADDRESS: Final = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::(.*))?")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_HOST: Final = re.compile(r"[\w.-]{1,253}")
_BAD_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")


def _without_query(path: str) -> str:
    """Hide the query of a websocket path: signed URLs carry their secret there."""
    before, mark, _ = path.partition("?")
    return f"{before}?***" if mark else path


@attrs.frozen
class BrokerURL:
    """One broker's address, as `parse` reads it.

    Attributes:
        scheme: ``mqtt``, ``mqtts``, ``ws``, ``wss`` or ``mqtt+unix``; a proxy's is ``socks5`` or ``http``.
        host: Name or IP address, IPv6 without brackets; empty for a Unix socket.
        port: The port; 0 for a Unix socket.
        path: Websockets: path and query, as sent in the handshake. Unix: the socket's path. Otherwise empty.
        username: Percent-decoded; None when the URL has none.
        password: Percent-decoded; None when the URL has none, empty when it has an empty one.
    """

    scheme: str
    host: str
    port: int
    path: str = attrs.field(default="", repr=lambda path: repr(_without_query(path)))
    username: str | None = None
    password: str | None = attrs.field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one URL.

        Raises:
            ValueError: It is malformed. The message says what to write instead, and quotes no part of *text*.
        """
        if not text:
            raise ValueError("the URL is empty: write 'mqtt://localhost:1883', for instance")
        _check_characters(text)
        scheme, rest = _split_scheme(text)
        username, password, address, path, extra = _split(rest)
        if scheme == "mqtt+unix":
            host, port, path = "", 0, _socket_path(address, path, extra)
        else:
            host, port = _host_and_port(address, _DEFAULT_PORTS[scheme])
            path = _websocket_path(path, extra) if scheme in ("ws", "wss") else _no_path(path + extra)
        return cls(
            scheme=scheme,
            host=host,
            port=port,
            path=path,
            username=username,
            password=password,
        )

    @property
    def tls(self) -> bool:
        return self.scheme in ("mqtts", "wss")

    @property
    def transport(self) -> Literal["tcp", "websockets", "unix"]:
        """How the bytes travel."""
        if self.scheme == "mqtt+unix":
            return "unix"
        return "websockets" if self.scheme in ("ws", "wss") else "tcp"

    @property
    def redacted(self) -> str:
        """The URL for logs and errors: ``***`` for the password and for a query."""
        userinfo = quote(self.username or "", safe="")
        if self.password is not None:
            userinfo += ":***"
        if userinfo:
            userinfo += "@"
        if self.scheme == "mqtt+unix":
            return f"{self.scheme}://{userinfo}{quote(self.path)}"
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
        return f"{self.scheme}://{userinfo}{host}:{self.port}{_without_query(self.path)}"

    def __str__(self) -> str:
        return self.redacted


def parse_urls(text: str) -> tuple[BrokerURL, ...]:
    """Read one URL, or several separated by commas; a comma inside a URL is written ``%2C``.

    Raises:
        ValueError: One of them is malformed; the message says which, and quotes no part of *text*.
    """
    pieces = text.split(",")
    if len(pieces) == 1:
        return (BrokerURL.parse(text.strip(" ")),)
    urls = []
    for number, piece in enumerate(pieces, start=1):
        try:
            urls.append(BrokerURL.parse(piece.strip(" ")))
        except ValueError as error:
            raise ValueError(
                f"number {number} of {len(pieces)}: {error} (a comma inside a password is written %2C)"
            ) from None
    return tuple(urls)


def parse_proxy(text: str) -> BrokerURL:
    """Read a proxy's URL: ``socks5://[user[:password]@]host:port``, or ``http://`` in its place.

    Raises:
        ValueError: It is malformed. The message quotes no part of *text*.
    """
    _check_characters(text)
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower().replace("socks5h", "socks5")
    if not separator or scheme not in ("socks5", "http"):
        raise ValueError("the URL must begin with socks5:// or http://: write 'socks5://host:1080'")
    username, password, address, path, extra = _split(rest)
    if path + extra not in ("", "/"):
        raise ValueError("the URL has a path, a query or a fragment, for which a proxy has no use: remove it")
    if any(part is not None and len(part.encode()) > _MAX_PROXY_BYTES for part in (username, password)):
        raise ValueError(f"the URL's user name or password is longer than {_MAX_PROXY_BYTES} bytes")
    if scheme == "http" and ":" in (username or ""):
        raise ValueError("the URL's user name contains ':', which a proxy of HTTP takes for its end")
    host, port = _host_and_port(address, 0)
    if not port:
        raise ValueError("the URL has no port: write 'socks5://host:1080', for instance")
    return BrokerURL(scheme, host, port, username=username, password=password)


def _check_characters(text: str) -> None:
    if " " in text or not text.isprintable():
        raise ValueError("the URL contains white space or an unprintable character: percent-encode it")


def _split(rest: str) -> tuple[str | None, str | None, str, str, str]:
    """User name and password, decoded; address; path; query and fragment."""
    match = _PARTS.fullmatch(rest)
    assert match is not None, "the pattern matches every text without line breaks"
    authority, path, query, fragment = (part or "" for part in match.groups())
    if authority.count("@") > 1 or (authority and "@" in path + query + fragment):
        raise ValueError(
            "the URL has '@', '/', '?' or '#' in its user name or password: "
            "percent-encode them as %40, %2F, %3F and %23, also an '@' after the host"
        )
    userinfo, _, address = authority.rpartition("@")
    username, colon, password = userinfo.partition(":")
    return (
        _decode(username, "user name") if username else None,
        _decode(password, "password") if colon else None,
        address,
        path,
        query + fragment,
    )


def _split_scheme(text: str) -> tuple[str, str]:
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator:
        raise ValueError("the URL has no scheme: write 'mqtt://localhost:1883', not 'localhost:1883'")
    if scheme in _OTHER_NAMES:
        raise ValueError(f"the URL's scheme is called {_OTHER_NAMES[scheme]!r} here, not {scheme!r}")
    if scheme not in _DEFAULT_PORTS:
        raise ValueError("the URL's scheme is unknown: use mqtt, mqtts, ws, wss or mqtt+unix")
    return scheme, rest


def _host_and_port(address: str, default_port: int) -> tuple[str, int]:
    if address.count(":") > 1 and not address.startswith("["):
        raise ValueError(
            "the URL has too many colons: an IPv6 address stands in brackets, 'mqtt://[::1]:1883'"
        )
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError("the URL's brackets are out of place: write 'mqtt://[::1]:1883'")
    ipv6, name, port = match.groups()
    if ipv6 is not None:
        ipv6 = unquote(ipv6)  # a zone: [fe80::1%25eth0]
        if not _is_ipv6(ipv6):
            raise ValueError("the URL's brackets do not hold an IPv6 address: write 'mqtt://[::1]:1883'")
    elif not name:
        raise ValueError("the URL has no host: write 'mqtt://localhost:1883', for instance")
    elif not _is_host(name):
        raise ValueError("the URL's host is not a host name: it has letters, digits, '-', '_' and '.' only")
    if port is None:
        return ipv6 or name, default_port
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= 65_535:
        raise ValueError(
            "the URL's port must be a number from 1 to 65,535 "
            "(if that was meant to be a password, the host is missing: 'mqtt://user:password@host:1883')"
        )
    return ipv6 or name, int(port)


def _no_path(path: str) -> str:
    if _PORT.fullmatch(path, 1):
        raise ValueError("the URL's port stands behind a colon: write 'mqtt://localhost:1883', for instance")
    if path not in ("", "/"):
        raise ValueError(
            "the URL has a path, a query or a fragment, for which mqtt and mqtts have no use: remove it"
        )
    return ""


def _websocket_path(path: str, query: str) -> str:
    if "#" in query:
        raise ValueError("the URL has a fragment, which websockets do not allow: percent-encode '#' as %23")
    if not (path + query).isascii():
        raise ValueError("the URL's path must be ASCII: percent-encode the other characters")
    return (path or "/mqtt") + query


def _socket_path(address: str, path: str, rest: str) -> str:
    if address:
        raise ValueError(
            "the URL has a host, which mqtt+unix does not: write three slashes, 'mqtt+unix:///path'"
        )
    if rest:
        raise ValueError("the URL's path contains '?' or '#': percent-encode them as %3F and %23")
    if path in ("", "/"):
        raise ValueError("the URL has no path: write 'mqtt+unix:///run/mosquitto.sock', for instance")
    return _decode(path, "path")


def _decode(text: str, noun: str) -> str:
    if _BAD_PERCENT.search(text):
        raise ValueError(f"the URL's {noun} has a '%' without two hexadecimal digits: write '%' as %25")
    decoded = unquote_to_bytes(text)
    if len(decoded) > MAX_STRING_BYTES:
        raise ValueError(f"the URL's {noun} is longer than {MAX_STRING_BYTES:,} bytes")
    if not _is_utf8(decoded):
        raise ValueError(
            f"the URL's {noun} does not decode to UTF-8: percent-encode the bytes of its UTF-8 form"
        )
    if b"\0" in decoded and noun != "password":
        raise ValueError(f"the URL's {noun} contains the character U+0000: remove it")
    return decoded.decode()


# These answer with a bool, so that no error that quotes its input hangs on as the context of ours.


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_ipv6(text: str) -> bool:
    import ipaddress  # late: few write one

    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _is_host(text: str) -> bool:
    """Whether name resolution will take it: its own check is a UnicodeError, late, on another thread."""
    if not _HOST.fullmatch(text):
        return False
    try:
        text.encode("idna")
    except UnicodeError:
        return False
    return True
